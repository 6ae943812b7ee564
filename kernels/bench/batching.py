"""Measure what continuous batching brings: the same prompts one at a time, in static batches, and as rows become free.

python -m bench.batching --out kernels/bench/results/batching-mini.json
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.record import write_record
from trimkv_cli.engine.engine import Engine
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import Request, SamplingParams


def make_requests(count: int, *, longest: int, vocab_size: int) -> list[Request]:
    """Return prompts of 8 to 64 random tokens whose answers have 1 to `longest` tokens, evenly spread and shuffled."""
    rng = random.Random(0)
    lengths = [1 + i * (longest - 1) // max(1, count - 1) for i in range(count)]
    rng.shuffle(lengths)
    return [
        Request(
            id=str(i),
            prompt_token_ids=tuple(rng.randrange(vocab_size) for _ in range(rng.randrange(8, 65))),
            params=SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True),
        )
        for i, length in enumerate(lengths)
    ]


def waves(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """Cut requests into groups of which each has to end before the next begins."""
    for start in range(0, len(requests), size):
        yield list(requests[start : start + size])


def run(engine: Engine, requests: Sequence[Request], size: int) -> tuple[float, float]:
    """Run groups of `size` one after the other; return generated tokens per second, and per second of CPU time."""
    started, cpu_started, tokens = time.perf_counter(), time.process_time(), 0
    for wave in waves(requests, size):
        tokens += sum(len(event.token_ids) for event in engine.generate(wave))
    return tokens / (time.perf_counter() - started), tokens / (time.process_time() - cpu_started)


def measure(engine: Engine, requests: Sequence[Request], rounds: int) -> dict[str, Any]:
    """Interleave the three ways; ratios are of medians per CPU time, which other work on the machine disturbs least."""
    sizes = {"one_at_a_time": 1, "static_batches": engine.max_rows, "continuous": len(requests)}
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in sizes}
    run(engine, requests[: engine.max_rows], engine.max_rows)  # warm up
    for _ in range(rounds):
        for name, size in sizes.items():
            speeds[name].append(run(engine, requests, size))
    per_cpu_s = {name: median(cpu for _, cpu in values) for name, values in speeds.items()}
    return {
        "tokens_per_s": {name: median(wall for wall, _ in values) for name, values in speeds.items()},
        "tokens_per_cpu_s": per_cpu_s,
        "all": speeds,
        "continuous_over_one_at_a_time": per_cpu_s["continuous"] / per_cpu_s["one_at_a_time"],
        "continuous_over_static": per_cpu_s["continuous"] / per_cpu_s["static_batches"],
    }


def main() -> None:
    """Measure and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--longest", type=int, default=200)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--kv-budget", default="64")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    options = EngineOptions(
        model=arguments.model,
        kv_budget=arguments.kv_budget,
        max_inflight=arguments.rows,
        threads=arguments.threads,
    )
    engine = load_engine(options)
    vocab_size = engine.facts.spec.vocab_size
    requests = make_requests(arguments.prompts, longest=arguments.longest, vocab_size=vocab_size)
    sizes = {"prompts": len(requests), "longest": arguments.longest, "rows": arguments.rows}
    measured = {"model": arguments.model, "kv_budget": arguments.kv_budget, **sizes}
    write_record("bench.batching", {**measured, **measure(engine, requests, arguments.rounds)}, arguments.out)


if __name__ == "__main__":
    main()
