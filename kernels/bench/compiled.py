"""Decode steps of one row as they are and compiled, in turns of a few steps within one process.

python -m bench.compiled --threads 1 --out kernels/bench/results/compile-10m-cpu.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.overheads import by_turns, decoding
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
    runs = [by_turns({name: engine.step for name, engine in engines.items()}, turns) for _ in range(repeats)]
    speeds = {name: median(1e3 / run[name] for run in runs) for name in engines}
    return {
        "context": context,
        "rows": 1,
        "eager_tps": speeds["eager"],
        "compiled_tps": speeds["compiled"],
        "compiled_over_eager": speeds["compiled"] / speeds["eager"],
        "ms_per_token": runs,
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
