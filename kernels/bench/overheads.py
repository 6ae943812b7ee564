"""What eviction and the display cost of a decode step, and how flat time per token stays: by switching and by turns.

python -m bench.overheads --out kernels/bench/results/overheads-10m-cpu.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.record import write_record
from trimkv_cli.bench.shapes import Network, find_shape, random_network
from trimkv_cli.bench.speed import Case, SpeedOptions, make_engine
from trimkv_cli.engine.engine import Engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import Request, SamplingParams

_TURN = 8  # steps before the other side has its turn


def _params(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def decoding(engine: Engine, context: int, *, tokens: int) -> None:
    """Bring an engine to where it decodes after `context` prompt tokens."""
    ids = torch.randint(engine.facts.spec.vocab_size, (context,), generator=torch.Generator().manual_seed(0)).tolist()
    engine.add(Request(id=str(context), prompt_token_ids=tuple(ids), params=_params(tokens)))
    while not engine.step():
        pass


def by_turns(sides: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Let each side take its steps in turn; return the median milliseconds of one step of each."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        for name, step in sides.items():
            step()  # warms up after the other side
            for _ in range(_TURN):
                started = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - started)
    return {name: median(taken) * 1e3 for name, taken in times.items()}


def eviction(network: Network, kv_budget: int, turns: int) -> dict[str, float]:
    """Time steps with and without scoring and eviction; a step without reads and gates as one with."""
    engines = {}
    for name, evicts in (("with_eviction_ms", True), ("without_eviction_ms", False)):
        case = Case(context=1024, rows=1, kv_budget=kv_budget)
        engines[name] = make_engine(network, case, SpeedOptions(eviction=evicts))
        decoding(engines[name], case.context, tokens=turns * (_TURN + 1) + 2)
        engines[name].close()
    taken = by_turns({name: engine.step for name, engine in engines.items()}, turns)
    return {**taken, "eviction_share": 1 - taken["without_eviction_ms"] / taken["with_eviction_ms"]}


def flatness(network: Network, kv_budget: int, turns: int, contexts: tuple[int, int]) -> dict[str, Any]:
    """Time steps after a short and after a long context."""
    engines = {}
    for context in contexts:
        engine = make_engine(network, Case(context=context, rows=1, kv_budget=kv_budget), SpeedOptions())
        decoding(engine, context, tokens=turns * (_TURN + 1) + 2)
        engine.close()
        engines[f"after_{context}_ms"] = engine
    taken = by_turns({name: engine.step for name, engine in engines.items()}, turns)
    first, last = taken.values()
    return {**taken, "long_over_short": last / first}


def display(network: Network, kv_budget: int, turns: int) -> dict[str, float]:
    """Time steps, and one look at the cache as the live panel takes it once a second."""
    engine = make_engine(network, Case(context=1024, rows=1, kv_budget=kv_budget), SpeedOptions())
    decoding(engine, 1024, tokens=turns * 2 * (_TURN + 1) + 2)
    taken = by_turns({"step_ms": engine.step, "glance_ms": engine.snapshot}, turns)
    engine.close()
    return {**taken, "display_share_at_1_hz": taken["glance_ms"] / 1e3}


def main() -> None:
    """Measure all three and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv-budget", type=int, default=256)
    parser.add_argument("--long", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    options = EngineOptions(device="cpu", dtype="fp32", threads=given.threads)
    network = random_network(find_shape("10m"), options)
    measured = {
        "shape": "10m",
        "kv_budget": given.kv_budget,
        "long": given.long,
        **eviction(network, given.kv_budget, given.turns),
        **display(network, given.kv_budget, given.turns),
        **flatness(network, given.kv_budget, given.turns, (1024, given.long)),
    }
    write_record("bench.overheads", measured, given.out)


if __name__ == "__main__":
    main()
