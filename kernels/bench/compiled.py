"""Kernels as compiled for GPUs that need not be here: registers, spills, shared memory and loads that run ahead.

python -m bench.compiled [--few] [--out FILE]

Without --out one JSON object is printed per kernel and GPU. --few leaves forms out that differ little from others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trimkv_kernels import decode, prefill, ranking, rows, step
from trimkv_kernels.launch import MOST_SPLITS, Chip, decode_launch, padded, prefill_launch

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
WIDTHS = (
    *(("bf16", dim) for dim in (128, 64, 80, 256)),
    ("fp16", 96),
    *(("fp32", dim) for dim in (64, 128, 256)),
)
IN_SLOTS = {"slot_key", "slot_value", "journal_key", "journal_value", "like_key"}
INTEGERS = ("size", "span", "fill", "length", "batch", "row", "split_slots", "splits")
REALS = ("scale", "eps", "before_eps")
FIXED = {
    "slot_log_beta": "*fp32", "log_beta": "*fp32", "slot_position": "*i32", "position": "*i32", "positions": "*i32",
    "part_sum": "*fp32", "part_stats": "*fp32", "part_score": "*fp32", "part_loser": "*i32", "rows": "*i64",
    "order": "*i32", "vacant": "*i32", "journal_log_beta": "*fp32", "journal_position": "*i32", "journal_slot": "*i64",
    "sinks": "*fp32",
    "spans": "*i32", "cos": "*fp32", "sin": "*fp32", "lowest": "*fp32", "loser": "*i32", "found_lowest": "*fp32",
    "found_loser": "*i32", "addresses": "*i64", "like_log_beta": "*fp32", "like_position": "*i32", "like_slot": "*i64",
    **dict.fromkeys(INTEGERS, "i32"), **dict.fromkeys(REALS, "fp32"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU: what Triton calls it, what decides the sizes there, and how much shared memory a program may take."""

    name: str
    gpu: GPUTarget
    chip: Chip
    shared_limit: int

    @classmethod
    def nvidia(cls, capability: int, kib: int, multiprocessors: int) -> Target:
        """Describe an NVIDIA GPU."""
        gpu, chip = GPUTarget("cuda", capability, 32), Chip(capability, multiprocessors)
        return cls(f"sm_{capability}", gpu, chip, kib * 1024)

    @property
    def has_eight_bits(self) -> bool:
        """Whether keys and values in 8 bits are offered there."""
        return self.chip.capability >= 89


# A100, RTX 4090, H200, RTX 5090, MI300X
TARGETS = (
    Target.nvidia(80, 163, 108),
    Target.nvidia(89, 99, 128),
    Target.nvidia(90, 227, 132),
    Target.nvidia(120, 99, 170),
    Target("gfx942", GPUTarget("hip", "gfx942", 64), Chip(0, 304), 64 * 1024),
)


@dataclass(frozen=True, slots=True)
class Form:
    """A kernel with what is constant in it, as its launcher chooses; `is_main` are those that differ most."""

    name: str
    kernel: Any
    dtype: str
    constants: Mapping[str, Any]
    warps: int
    is_main: bool = False


def forms(target: Target) -> Iterator[Form]:
    """Yield every kernel in the forms that it has on one GPU."""
    yield from _decodes(target)
    yield from _prefills(target)
    yield from _steps()


def _decodes(target: Target) -> Iterator[Form]:
    for dtype, dim in WIDTHS:
        launch = decode_launch(programs=8, size=4096, head_dim=dim, element_size=SIZES[dtype], chip=target.chip)
        shape: dict[str, Any] = {"HEADS": 8, "GROUPS": 4, "DIM": dim, "WIDE": padded(dim), "EVICT": True}
        shape |= {"RECENT": 0, "STATIC": False, "spans": None}
        constants = {**shape, "TILE": 16, "BLOCK": launch.block, "WINDOW": 0}
        is_main = dim == 128 and dtype == "bf16"
        scan = Form(f"scan {dtype} {dim}", decode._scan, dtype, constants, launch.warps, is_main)
        constants = {**shape, "SPLITS": MOST_SPLITS, "sinks": None, "found_lowest": None, "found_loser": None}
        merge = Form(f"merge {dtype} {dim}", decode._merge, dtype, constants, launch.merge_warps, is_main)
        yield from (scan, merge)
        if is_main:
            yield from _more_decodes(scan, merge)
            if target.has_eight_bits:
                yield from (_eight_bits(scan), _eight_bits(merge))


def _more_decodes(scan: Form, merge: Form) -> Iterator[Form]:
    """Yield what the main form of a decode becomes with each of its options."""
    yield _changed(scan, "window", WINDOW=1024, RECENT=4)
    yield _changed(scan, "static spans", without=("spans",), STATIC=True)
    yield _changed(merge, "static spans", without=("spans",), STATIC=True)
    yield _changed(merge, "sinks", without=("sinks",))
    for form in (scan, merge):
        yield _changed(form, "16 queries", GROUPS=16)
        yield _changed(form, "no eviction", EVICT=False)
    halved = {name: None for name in decode._merge.arg_names if name.startswith(("slot_", "journal_"))}
    yield _changed(merge, "finds", without=("found_lowest", "found_loser"), log_beta=None, **halved)


def _prefills(target: Target) -> Iterator[Form]:
    for dtype, dim, tokens in (*((*width, 512) for width in WIDTHS), ("bf16", 128, 8)):
        how: dict[str, Any] = {"head_dim": dim, "element_size": SIZES[dtype], "chip": target.chip}
        launch = prefill_launch(queries=4 * tokens, **how)
        constants: dict[str, Any] = {
            "HEADS": 8,
            "GROUPS": 4,
            "DIM": dim,
            "WIDE": padded(dim),
            "WINDOW": 0,
            "sinks": None,
        }
        constants |= {"QUERIES": launch.queries, "KEYS": launch.keys}
        is_main = (dtype, dim, tokens) == ("bf16", 128, 512)
        attend = Form(f"attend {dtype} {dim} {tokens}", prefill._attend, dtype, constants, launch.warps, is_main)
        yield attend
        if is_main:
            yield _changed(attend, "window sinks", without=("sinks",), WINDOW=1024)
            if target.has_eight_bits:
                yield _eight_bits(attend)
    constants = {"HEADS": 8, "DIM": 128, "WIDE": 128}
    yield Form("move bf16 128", prefill._move, "bf16", constants, 1)
    yield Form("move fp32 256", prefill._move, "fp32", {**constants, "DIM": 256, "WIDE": 256}, 1)
    constants = {"HEADS": 8, "WINDOW": 512, "RECENT": 3, "STATIC": False, "BLOCK": 1024}
    yield Form("rank", ranking._rank, "bf16", constants, 8)


def _steps() -> Iterator[Form]:
    """Yield what stands between the matrix products of a whole step, at widths of Qwen3 and Gemma 3."""
    for dtype, size, before in (("bf16", 2560, True), ("fp32", 8192, False)):
        constants: dict[str, Any] = {"OFFSET": 0.0, "BLOCK": triton.next_power_of_2(size)}
        constants |= {} if before else {"before": None}
        yield Form(f"add_norm {dtype} {size}", step._add_norm, dtype, constants, min(16, constants["BLOCK"] // 256))
    for dtype, dim in (("bf16", 128), ("fp32", 256)):
        heads: dict[str, Any] = {"HEADS": 8, "DIM": dim, "WIDE": triton.next_power_of_2(dim)}
        yield Form(f"rotate {dtype} {dim}", step._rotate, dtype, {**heads, "OFFSET": 1.0, "QUERIES": 32}, 1)
        yield Form(f"evict {dtype} {dim}", step._evict, dtype, {**heads, "RECENT": 3, "STATIC": False}, 1)
    yield Form("undo bf16 256", rows._undo, "bf16", heads, 1)
    yield Form("clear bf16 256", rows._clear, "bf16", {**heads, "PIECE": 16}, 4)
    yield Form("activate bf16 silu", step._activate, "bf16", {"IS_SILU": True, "BLOCK": 1024}, 4)
    yield Form("activate bf16 gelu", step._activate, "bf16", {"IS_SILU": False, "BLOCK": 1024}, 4)


def _changed(form: Form, name: str, *, without: tuple[str, ...] = (), **constants: Any) -> Form:
    kept = {key: value for key, value in form.constants.items() if key not in without}
    return replace(form, name=f"{form.name} {name}", constants={**kept, **constants}, is_main=False)


def _eight_bits(form: Form) -> Form:
    """Return a form for slots in 8 bits and a query in 16."""
    return replace(form, name=form.name.replace(form.dtype, "fp8"), dtype="fp8", is_main=False)


def measure(form: Form, target: Target) -> dict[str, Any]:
    """Compile one form, and say what the compiler of the GPU's own code says it takes."""
    names = form.kernel.arg_names
    held, plain = ("*fp8e4nv", "*bf16") if form.dtype == "fp8" else (f"*{form.dtype}",) * 2
    types = {name: FIXED.get(name) or (held if name in IN_SLOTS else plain) for name in names}
    signature = {name: "constexpr" if name in form.constants else kind for name, kind in types.items()}
    places = {(names.index(name),): value for name, value in form.constants.items()}
    aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(fn=form.kernel, signature=signature, constexprs=places, attrs=aligned)
    made = triton.compile(source, target=target.gpu, options={"num_warps": form.warps})
    used = _amd_code(made.asm["amdgcn"]) if target.gpu.backend == "hip" else _nvidia_code(made.asm["ptx"], target)
    buffers = re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\d+x", made.asm["ttgir"])
    tiles = {name.lower(): form.constants[name] for name in ("QUERIES", "KEYS", "BLOCK") if name in form.constants}
    return {"kernel": form.name, "target": target.name, **used, "shared_bytes": made.metadata.shared,
            "shared_limit": target.shared_limit, "buffers": max(map(int, buffers), default=0),
            "products": _products(made.asm["ttgir"]), "warps": form.warps, "tiles": tiles}  # fmt: skip


def _products(ttgir: str) -> str | None:
    """Name the instructions of the matrix products, where there are some."""
    if "warp_group_dot" in ttgir:
        return "wgmma"
    return ("mfma" if "amd_mfma" in ttgir else "mma") if "tt.dot " in ttgir else None


def _nvidia_code(ptx: str, target: Target) -> dict[str, int]:
    name = target.name + ("a" if target.chip.capability >= 90 else "")
    blackwell = NVIDIA / "ptxas-blackwell"
    ptxas = blackwell if target.chip.capability >= 100 and blackwell.exists() else NVIDIA / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(ptxas), "-v", f"--gpu-name={name}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))
    return {"registers": max(map(int, re.findall(r"Used (\d+) registers", said))), "spill_bytes": spills}


def _amd_code(code: str) -> dict[str, int]:
    registers, spills = (int(re.findall(rf"\.vgpr_{what}:\s+(\d+)", code)[0]) for what in ("count", "spill_count"))
    return {"registers": registers, "spill_bytes": 4 * spills}


def main() -> None:
    """Compile all forms for all GPUs; print a line for each, or write a record of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    measured = []
    for target in TARGETS:
        for form in forms(target):
            if given.few and not (form.is_main or (target.name == "sm_90" and form.dtype in ("bf16", "fp8"))):
                continue
            measured.append(measure(form, target))
            if given.out is None:
                print(json.dumps(measured[-1]), flush=True)
    if given.out is not None:
        from bench.record import write_record

        write_record("bench.compiled", {"triton": triton.__version__, "kernels": measured}, given.out)


if __name__ == "__main__":
    main()
