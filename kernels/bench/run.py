"""Measure the operations, after their tests: a red test means no number.

    python kernels/bench/run.py [--device cuda|cpu] [--repeats N]

Appends one JSON row per shape to kernels/bench/results/<device>.jsonl: the 20th, 50th and 80th percentile of the time,
the bytes that must move, and their share of the copy bandwidth measured in the same run. On a CPU it is the reference
that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from bench.cases import Case, cpu_cases, gpu_cases
from trimkv_cli.bench.speed import own_commit

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TESTS = {"cuda": ["-m", "gpu", "tests/kernel/test_triton.py"], "cpu": ["tests/kernel/test_reference.py"]}
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**28}


def run_tests(device: str) -> bool:
    """Run the tests of the operations; true when all are green and at least one ran."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *TESTS[device]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr, file=sys.stderr)
    return done.returncode == 0 and re.search(r"\d+ passed", done.stdout) is not None


def time_once(step: Callable[[], Any], device: torch.device) -> float:
    """Return the milliseconds of one call, on the device's own clock where it has one."""
    if device.type == "cpu":
        started = time.perf_counter()
        step()
        return (time.perf_counter() - started) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    end.synchronize()
    elapsed: float = start.elapsed_time(end)
    return elapsed


def percentiles(step: Callable[[], Any], device: torch.device, repeats: int) -> dict[str, float]:
    """Time `step` after a warm-up, each time with a cold L2 cache on a GPU."""
    flush = torch.empty(2**28 if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    for _ in range(5):
        step()
    times = []
    for _ in range(repeats):
        flush.zero_()
        times.append(time_once(step, device))
    tenths = quantiles(times, n=10)
    return {"ms_p20": tenths[1], "ms_p50": tenths[4], "ms_p80": tenths[7]}


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Return the bytes per second of a copy, read and written bytes counted."""
    size = COPIED_BYTES[device.type]
    source, target = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    measured = percentiles(lambda: target.copy_(source), device, repeats)
    return 2 * size / measured["ms_p50"] * 1e3


def make_step(case: Case, device: torch.device) -> Callable[[], Any]:
    """Build the tensors of a case, its slots full, and return one call of its operation."""
    from trimkv_kernels import Journal, Slots, operations_for

    torch.manual_seed(0)
    operations, dtype = operations_for(device), DTYPES[case.dtype]
    heads, dim, size = case.num_kv_heads, case.head_dim, case.slots
    slots = Slots.empty(rows=case.rows, num_kv_heads=heads, slots=size, head_dim=dim, dtype=dtype, device=device)
    slots.key.normal_()
    slots.value.normal_()
    slots.log_beta.uniform_(-0.1, 0.0)
    slots.position.copy_(torch.arange(size, dtype=torch.int32))
    shape = (case.rows, heads, case.tokens)
    query = torch.randn(case.rows, heads * case.groups, case.tokens, dim, device=device, dtype=dtype)
    key, value = (torch.randn(*shape, dim, device=device, dtype=dtype) for _ in range(2))
    log_beta = -0.1 * torch.rand(shape, device=device)
    position = (size + torch.arange(case.tokens, dtype=torch.int32, device=device)).expand(case.rows, -1).contiguous()
    settings: dict[str, Any] = {"fill": size, "scale": dim**-0.5, "window": case.window}
    if case.op == "decode":
        one = tuple(tensor[:, :, 0].contiguous() for tensor in (query, key, value, log_beta))
        journal = Journal.beside(slots)
        return lambda: operations.decode(*one, position[:, 0].contiguous(), slots, journal, dense=True, **settings)
    rows = torch.arange(case.rows, device=device)
    return lambda: operations.prefill(query, key, value, log_beta, position, slots, rows=rows, **settings)


def surroundings(device: torch.device) -> dict[str, Any]:
    """Say where and with what this is measured."""
    return {
        "command": " ".join(["python", "kernels/bench/run.py", *sys.argv[1:]]),
        "commit": own_commit(),
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "implementation": "triton" if device.type == "cuda" else "reference",
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    """Test, measure, and append what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--repeats", type=int, default=100)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if not run_tests(device.type):
        print("error: the tests of the operations are not green: no number", file=sys.stderr)
        return 1
    about = surroundings(device)
    name = re.sub(r"[^a-z0-9]+", "-", about["hardware"].lower() if device.type == "cuda" else "cpu")
    bandwidth = copy_bandwidth(device, max(10, arguments.repeats // 5))
    results = ROOT / "kernels" / "bench" / "results" / f"{name}.jsonl"
    with torch.inference_mode(), results.open("a", encoding="utf-8") as file:
        for case in gpu_cases() if device.type == "cuda" else cpu_cases():
            measured = percentiles(make_step(case, device), device, arguments.repeats)
            share = case.bytes_moved / (measured["ms_p50"] / 1e3) / bandwidth
            row = {**asdict(case), **measured, "bytes_moved": case.bytes_moved, "copy_bandwidth": bandwidth,
                   "share_of_copy_bandwidth": share, **about}  # fmt: skip
            file.write(json.dumps(row) + "\n")
            print(f"{case.op:8} rows {case.rows:3} M {case.slots:6} {case.dtype}: {measured['ms_p50']:.4f} ms, "
                  f"{share:.0%} of copy bandwidth")  # fmt: skip
    return 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
