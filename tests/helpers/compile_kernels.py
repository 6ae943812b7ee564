"""Compile every kernel for GPUs that are not here and print what each costs; run without TRITON_INTERPRET."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trimkv_kernels import decode, prefill, rows, step
from trimkv_kernels.launch import decode_launch, padded, prefill_launch

POINTERS = {"fp32": "*fp32", "fp16": "*fp16", "bf16": "*bf16"}
SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
TARGETS = (80, 90)
EIGHT_BIT_TARGETS = (89, 90)
IN_SLOTS = {"slot_key", "slot_value", "journal_key", "journal_value", "like_key"}
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
INTEGERS = {"size": "i32", "span": "i32", "fill": "i32", "length": "i32", "batch": "i32", "row": "i32"}
REALS = {"scale": "fp32", "eps": "fp32", "before_eps": "fp32"}
EVICTS = {"found_lowest": None, "found_loser": None}
FIXED = {
    "slot_log_beta": "*fp32", "log_beta": "*fp32", "slot_position": "*i32", "position": "*i32", "positions": "*i32",
    "part_acc": "*fp32", "part_stats": "*fp32", "part_score": "*fp32", "part_loser": "*i32", "rows": "*i64",
    "target": "*i64", "journal_log_beta": "*fp32", "journal_position": "*i32", "journal_slot": "*i64", "sinks": "*fp32",
    "spans": "*i32", "cos": "*fp32", "sin": "*fp32", "lowest": "*fp32", "loser": "*i32", "found_lowest": "*fp32",
    "found_loser": "*i32", "addresses": "*i64", "like_log_beta": "*fp32", "like_position": "*i32", "like_slot": "*i64",
}  # fmt: skip


_DIMS = {"fp32": (64, 128, 256), "fp16": (128,), "bf16": (64, 80, 128, 256)}  # fp32 is for checks, not for speed


def cases() -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    """Yield name, kernel, constants and warps of each case, as the launchers choose them."""
    for dtype in POINTERS:
        for dim in _DIMS[dtype]:
            width = {"head_dim": dim, "element_size": SIZES[dtype]}
            for window in (0, 1024) if dim == 128 else (0,):
                chosen = decode_launch(programs=8, size=4096, **width)
                shape = {"HEADS": 8, "GROUPS": 4, "TILE": 16, "DIM": dim, "WIDE": padded(dim), "EVICT": True}
                scan = {
                    **shape,
                    "SPLIT_SLOTS": chosen.split_slots,
                    "BLOCK": chosen.block,
                    "WINDOW": window,
                    "RECENT": window,
                    "STATIC": False,
                    "spans": None,
                }
                yield f"scan {dtype} {dim} {window}", (decode._scan, dtype), scan, chosen.warps
                wide = prefill_launch(**width)
                attend = {
                    "HEADS": 32, "GROUPS": 4, "QUERIES": wide.queries, "KEYS": wide.keys, "DIM": dim,
                    "WIDE": padded(dim), "WINDOW": window,
                }  # fmt: skip
                yield f"attend {dtype} {dim} {window}", (prefill._attend, dtype), {**attend, "sinks": None}, wide.warps
            merge = {**shape, **EVICTS, "SPLITS": 8, "RECENT": 0, "STATIC": False, "spans": None}
            if dim == 256:
                held = ({name: value for name, value in part.items() if name != "spans"} for part in (scan, merge))
                static_scan, static_merge = ({**part, "STATIC": True} for part in held)
                yield f"scan {dtype} {dim} spans", (decode._scan, dtype), static_scan, chosen.warps
                static_merge["sinks"] = None
                yield f"merge {dtype} {dim} spans", (decode._merge, dtype), static_merge, chosen.warps
            yield f"merge {dtype} {dim}", (decode._merge, dtype), {**merge, "sinks": None}, chosen.warps
            if dim == 64:  # that of gpt-oss
                yield f"attend {dtype} {dim} sinks", (prefill._attend, dtype), attend, wide.warps
                yield f"merge {dtype} {dim} sinks", (decode._merge, dtype), merge, chosen.warps
            yield f"move {dtype} {dim}", (prefill._move, dtype), {"HEADS": 8, "DIM": dim, "WIDE": padded(dim)}, 1


def steps() -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    """Yield what stands between the matrix products of a whole step, at widths of Qwen3 and Gemma 3."""
    for dtype, size, before in (("bf16", 2560, True), ("fp32", 8192, False)):
        constants: dict[str, Any] = {"OFFSET": 0.0, "BLOCK": triton.next_power_of_2(size)}
        if not before:
            constants["before"] = None
        yield f"add_norm {dtype} {size}", (step._add_norm, dtype), constants, min(16, constants["BLOCK"] // 256)
    for dtype, dim in (("bf16", 128), ("fp16", 96), ("fp32", 256)):
        heads: dict[str, Any] = {"HEADS": 8, "DIM": dim, "WIDE": triton.next_power_of_2(dim)}
        yield f"rotate {dtype} {dim}", (step._rotate, dtype), {**heads, "OFFSET": 1.0, "QUERIES": 32}, 1
        yield f"evict {dtype} {dim}", (step._evict, dtype), {**heads, "RECENT": 0, "STATIC": False}, 1
    yield f"undo bf16 {dim}", (rows._undo, "bf16"), heads, 1
    yield f"clear bf16 {dim}", (rows._clear, "bf16"), {**heads, "PIECE": 16}, 4
    evict = {"HEADS": 8, "DIM": 128, "WIDE": 128, "RECENT": 3, "STATIC": True, "spans": None}
    yield "evict fp8 128", (step._evict, "fp8"), evict, 1
    for is_silu in (True, False):
        yield f"activate bf16 {is_silu}", (step._activate, "bf16"), {"IS_SILU": is_silu, "BLOCK": 1024}, 4
    finds: dict[str, Any] = {"GROUPS": 4, "TILE": 16, "SPLITS": 8, "EVICT": True, **heads, "DIM": 128, "WIDE": 128}
    finds |= {"RECENT": 0, "STATIC": False, "log_beta": None, "sinks": None, "spans": None}
    finds |= {name: None for name in decode._merge.arg_names if name.startswith(("slot_", "journal_"))}
    yield "merge bf16 128 finds", (decode._merge, "bf16"), finds, 4


def eight_bits() -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    """Yield each kernel over slots in 8 bits, for a query in 16."""
    for name, (kernel, dtype), constants, warps in cases():
        if name in ("scan bf16 128 0", "merge bf16 128", "attend bf16 128 0", "move bf16 128"):
            yield name.replace(dtype, "fp8"), (kernel, "fp8"), constants, warps


def extremes() -> Iterator[tuple[str, Any, dict[str, Any], int]]:
    """Yield the most slots and queries per KV head, with eviction and without."""
    chosen = decode_launch(programs=1, size=16_384, head_dim=128, element_size=2)
    for evict in (True, False):
        shape = {"HEADS": 1, "GROUPS": 16, "TILE": 16, "DIM": 128, "WIDE": 128, "RECENT": 0, "EVICT": evict}
        shape |= {"STATIC": False, "spans": None}
        scan = {**shape, "SPLIT_SLOTS": chosen.split_slots, "BLOCK": chosen.block, "WINDOW": 0}
        yield f"scan bf16 16384 {evict}", (decode._scan, "bf16"), scan, chosen.warps
        merge = {**shape, **EVICTS, "SPLITS": chosen.splits, "sinks": None}
        yield f"merge bf16 16384 {evict}", (decode._merge, "bf16"), merge, chosen.warps


def measure(kernel: Any, dtype: str, constants: Mapping[str, Any], warps: int, capability: int) -> dict[str, Any]:
    """Compile one kernel and let ptxas say what it uses."""
    held, plain = ("*fp8e4nv", "*bf16") if dtype == "fp8" else (POINTERS[dtype],) * 2
    others = {name: held if name in IN_SLOTS else plain for name in kernel.arg_names}
    types = {name: FIXED.get(name) or INTEGERS.get(name) or REALS.get(name) or other for name, other in others.items()}
    signature = {name: "constexpr" if name in constants else kind for name, kind in types.items()}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=places),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        name = "sm_90a" if capability == 90 else f"sm_{capability}"
        command = [str(PTXAS), "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
    return {"registers": max(map(int, re.findall(r"Used (\d+) registers", said))), "spill_bytes": spills,
            "shared_bytes": compiled.metadata.shared, "shared_limit": SHARED_LIMIT[capability]}  # fmt: skip


def main() -> None:
    for name, (kernel, dtype), constants, warps in (*eight_bits(), *steps(), *cases(), *extremes()):
        for capability in EIGHT_BIT_TARGETS if dtype == "fp8" else TARGETS:
            row = {"kernel": name, "sm": capability, **measure(kernel, dtype, constants, warps, capability)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
