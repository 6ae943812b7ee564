"""Stage 5: the operations timed in captured graphs over slots that no cache holds, and other launches of them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.cases import Case, gpu_cases, small_cases
from bench.gpu_stages.env import copy_bandwidth
from bench.gpu_stages.smoke import DTYPES, TOLERANCE
from bench.gpu_stages.stage import Check, Evidence, Facts, Setting, not_shown, wanted
from bench.gpu_stages.timing import seconds_each
from trimkv_kernels import Journal, Operations, Slots, operations_for, reference
from trimkv_kernels.launch import MOST_SPLITS

_COLD_BYTES = 2**28  # several times the L2 cache of any GPU
_MOST_SETS = 64
_REPLAYS = 25
_WANTED = {("decode", 64, 4096): 0.75}  # of copy bandwidth
_SMALLEST = {"rows": 1, "num_kv_heads": 1, "groups": 2, "head_dim": 16, "slots": 70, "dtype": "fp32"}

Call = Callable[[], Tensor]
Launch = Any  # what `launch.py` returns


def make_call(case: Case, device: torch.device, operations: Operations) -> tuple[Call, Slots]:
    """Return one call of a case's operation and the full slots that it works on, the same values each time."""
    generator = torch.Generator(device).manual_seed(0)
    heads, dim, size, dtype = case.num_kv_heads, case.head_dim, case.slots, DTYPES[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    slots = Slots.empty(rows=case.rows, num_kv_heads=heads, slots=size, head_dim=dim, dtype=dtype, device=device)
    slots.key.normal_(generator=generator)
    slots.value.normal_(generator=generator)
    slots.log_beta.uniform_(-0.1, 0.0, generator=generator)
    slots.position.copy_(torch.arange(size, dtype=torch.int32))
    new = (case.rows, heads, case.tokens)
    query, key, value = normal(case.rows, heads * case.groups, case.tokens, dim), normal(*new, dim), normal(*new, dim)
    log_beta = -0.1 * torch.rand(new, generator=generator, device=device)
    position = (size + torch.arange(case.tokens, dtype=torch.int32, device=device)).expand(case.rows, -1).contiguous()
    how: dict[str, Any] = {"fill": size, "scale": dim**-0.5, "window": case.window}
    if case.op == "decode":
        one = [tensor[:, :, 0].contiguous() for tensor in (query, key, value, log_beta)]
        journal, now = Journal.beside(slots), position[:, 0].contiguous()
        return lambda: operations.decode(*one, now, slots, journal, dense=True, **how), slots
    rows = torch.arange(case.rows, device=device)
    return lambda: operations.prefill(query, key, value, log_beta, position, slots, rows=rows, **how), slots


def sets_of(case: Case, setting: Setting) -> int:
    """Return how many sets of slots take turns, so that each has left the cache before its turn comes again."""
    return 1 if setting.tiny else max(2, min(_MOST_SETS, -(-_COLD_BYTES // case.bytes_moved)))


def time_case(case: Case, setting: Setting, operations: Operations) -> float:
    """Return the seconds of one call."""
    calls = [make_call(case, setting.device, operations)[0] for _ in range(sets_of(case, setting))]
    return seconds_each(calls, setting, replays=1 if setting.tiny else _REPLAYS)


def operations(setting: Setting) -> Iterator[Evidence]:
    """Time every case, beside what a copy of its bytes would take."""
    chosen, bandwidth = operations_for(setting.device), copy_bandwidth(setting)
    triton = chosen.decode is not reference.decode
    yield Evidence(check="triton is what is timed", ok=triton == setting.on_gpu, facts={"triton": triton})
    for case in small_cases() if setting.tiny else gpu_cases():
        try:
            seconds = time_case(case, setting, chosen)
        except Exception as failure:  # noqa: BLE001  the others still have something to show
            yield Evidence(check=_name(case), ok=False, facts={"error": _first_line(failure)})
            continue
        share = case.bytes_moved / seconds / bandwidth
        facts: Facts = {"us": seconds * 1e6, "share": share, "bytes": case.bytes_moved, "sets": sets_of(case, setting)}
        least = _WANTED.get((case.op, case.rows, case.slots))
        beside = {} if least is None else wanted(share, least=least, form="{:.0%} of copy bandwidth")
        facts |= {**beside, **asdict(case)}
        yield Evidence(check=_name(case), ok=0 < share < 2, facts=facts)


def _name(case: Case) -> str:
    window = "" if case.window is None else " window"
    return f"{case.op} {case.dtype} rows {case.rows} M {case.slots} D {case.head_dim}{window}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def resized(launch: Launch, size: int, *, block: int | None = None, splits: float = 1) -> Launch:
    """Return a decode's launch that reads other numbers of slots at a time, and has so many times the splits."""
    block = block or launch.block
    blocks = -(-size // block)
    per_split = -(-blocks // max(1, min(blocks, MOST_SPLITS, round(launch.splits * splits)))) * block
    return replace(launch, block=block, splits=-(-size // per_split), split_slots=per_split)


def variants(case: Case) -> Iterator[tuple[str, Callable[[Launch], Launch]]]:
    """Yield other launches of a case's operation: what each is called, and how it follows from the chosen one."""
    if case.op == "decode":
        for block in (32, 64, 128):
            yield f"block {block}", partial(resized, size=case.slots, block=block)
        for splits in (0.5, 2, 4):
            yield f"{splits:g} × splits", partial(resized, size=case.slots, splits=splits)
        for warps in (2, 8):
            yield f"{warps} warps", partial(replace, warps=warps)
        return
    for queries, keys, warps in ((32, 32, 8), (64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 64, 8)):
        yield f"{queries} × {keys}, {warps} warps", partial(replace, queries=queries, keys=keys, warps=warps)


def launches(setting: Setting) -> Iterator[Evidence]:
    """Time the operations with other sizes, each held to what the chosen ones compute."""
    if not setting.on_gpu:
        yield not_shown("other launches", "a CPU launches nothing; see the interpreter")
        return
    qwen3: dict[str, Any] = {"num_kv_heads": 8, "groups": 4, "head_dim": 128, "dtype": "bf16"}
    for rows, slots in ((1, 512), (8, 1024), (64, 4096)):
        yield from compare(Case(op="decode", rows=rows, slots=slots, tokens=1, **qwen3), setting)
    for slots in (1024, 4096):
        yield from compare(Case(op="prefill", rows=1, slots=slots, tokens=512, **qwen3), setting)


def compare(case: Case, setting: Setting) -> Iterator[Evidence]:
    """Compare other launches of a case with the chosen one, in what they compute and how long they take."""
    from trimkv_kernels.decode import decode
    from trimkv_kernels.prefill import prefill

    module, chosen = importlib.import_module(f"trimkv_kernels.{case.op}"), Operations(decode, prefill)
    name = f"{case.op}_launch"
    own: Callable[..., Launch] = getattr(module, name)
    call, slots = make_call(case, setting.device, chosen)
    want, seconds = call(), time_case(case, setting, chosen)
    for variant, change in variants(case):
        check = f"{_name(case)}: {variant}"
        with mock.patch.object(module, name, lambda change=change, **shape: change(own(**shape))):
            try:
                call, other = make_call(case, setting.device, chosen)
                error = ((call() - want).norm() / want.norm()).item()
                taken = time_case(case, setting, chosen)
            except Exception as failure:  # noqa: BLE001  the others still have something to show
                said, too_large = _first_line(failure), type(failure).__module__.startswith("triton.")
                yield not_shown(check, said) if too_large else Evidence(check=check, ok=False, facts={"error": said})
                continue
        same = torch.equal(other.position, slots.position) if case.op == "prefill" else True
        facts = {"us": taken * 1e6, "chosen_us": seconds * 1e6, "over_chosen": taken / seconds, "error": error}
        yield Evidence(check=check, ok=error <= TOLERANCE[case.dtype] and same, facts=facts)


def interpreted(setting: Setting) -> Iterator[Evidence]:
    """Run other launches in Triton's interpreter, where no GPU runs them."""
    if setting.on_gpu or importlib.util.find_spec("triton") is None:
        yield not_shown("other launches, interpreted", "a GPU runs them" if setting.on_gpu else "there is no triton")
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", "bench.gpu_stages.kernels"], env=environment, check=False)
    yield Evidence(check="other launches, interpreted", ok=done.returncode == 0, facts={"exit_code": done.returncode})


def _interpret() -> int:
    """Compare some launches in the interpreter, on the CPU."""
    from pathlib import Path

    setting = Setting(device=torch.device("cpu"), tiny=True, scratch=Path())
    decode, prefill = (Case(op=op, tokens=tokens, **_SMALLEST) for op, tokens in (("decode", 1), ("prefill", 9)))
    found = [*compare(decode, setting), *compare(prefill, setting)]
    print(*found, sep="\n")
    return int(len(found) < 13 or any(not one.ok or "not_shown" in one.facts for one in found))


CHECKS: tuple[Check, ...] = (operations, launches, interpreted)

if __name__ == "__main__":
    sys.exit(_interpret())
