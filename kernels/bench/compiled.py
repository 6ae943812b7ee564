"""Decode steps of one row as they are and compiled, in turns of a few steps within one process.

CPU time is what steps take on a machine with nothing else to do; other processes lengthen wall time alone.

python -m bench.compiled --threads 1 --out kernels/bench/results/compile-10m-cpu.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.overheads import decoding
from bench.record import write_record
from trimkv_cli.bench.shapes import Network, find_shape, random_network
from trimkv_cli.bench.speed import Case, SpeedOptions, make_engine
from trimkv_cli.loading.options import EngineOptions

_CONTEXTS = (1024, 8192)


def compare(network: Network, context: int, *, kv_budget: int, turns: int, repeats: int) -> dict[str, Any]:
    """Time both kinds of steps after a context; medians of the repeats' medians."""
    engines = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        engine = make_engine(
            network, Case(context=context, rows=1, kv_budget=kv_budget), SpeedOptions(compiled=compiled)
        )
        decoding(engine, context, tokens=repeats * turns * 9 + 64)
        engine.close()
        for _ in range(32):  # the first compile
            engine.step()
        engines[name] = engine
    sides = {name: engine.step for name, engine in engines.items()}
    runs = [_by_turns(sides, turns) for _ in range(repeats)]
    speeds = {name: median(1e3 / run[name]["cpu_ms"] for run in runs) for name in engines}
    return {
        "context": context,
        "rows": 1,
        "eager_tps": speeds["eager"],
        "compiled_tps": speeds["compiled"],
        "compiled_over_eager": speeds["compiled"] / speeds["eager"],
        "wall_compiled_over_eager": median(run["eager"]["wall_ms"] / run["compiled"]["wall_ms"] for run in runs),
        "runs": runs,
    }


def _by_turns(sides: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, dict[str, float]]:
    """Let each side take its steps in turn; return the median milliseconds of one step of each."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, step in sides.items():
            step()  # warms up after the other side
            for _ in range(8):
                wall, cpu = time.perf_counter(), time.process_time()
                step()
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: {clock: median(taken[i] for taken in all_taken) * 1e3 for i, clock in enumerate(("wall_ms", "cpu_ms"))}
        for name, all_taken in times.items()
    }


def main() -> None:
    """Measure both contexts and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-budget", type=int, default=256)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    options = EngineOptions(device="cpu", dtype="fp32", threads=given.threads)
    if given.threads:
        torch.set_num_threads(given.threads)
    network = random_network(find_shape("10m"), options)
    cases = [
        compare(network, context, kv_budget=given.kv_budget, turns=given.turns, repeats=given.repeats)
        for context in _CONTEXTS
    ]
    measured = {"shape": "10m", "kv_budget": given.kv_budget, "turns": given.turns, "cases": cases}
    write_record("bench.compiled", measured, given.out)


if __name__ == "__main__":
    main()
