"""Count how often a request's tokens depend on what runs beside it: 1,000 requests alone, and the same in batches.

python -m bench.flips --out kernels/bench/results/flips-cpu.json
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.record import write_record
from trimkv_cli.engine.engine import Engine
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import Request, SamplingParams


def make_requests(count: int, *, vocab_size: int, greedy: bool) -> Iterator[Request]:
    """Yield requests with random prompts of 4 to 60 tokens and 32 tokens to generate."""
    rng = random.Random(0)
    for i in range(count):
        prompt = tuple(rng.randrange(vocab_size) for _ in range(rng.randrange(4, 61)))
        params = SamplingParams(max_tokens=32, temperature=0.0 if greedy else 1.0, seed=i, ignore_eos=True)
        yield Request(id=str(i), prompt_token_ids=prompt, params=params)


def run(engine: Engine, requests: Iterator[Request]) -> dict[str, list[int]]:
    """Return each request's output ids."""
    output: dict[str, list[int]] = {}
    for event in engine.generate(requests):
        output.setdefault(event.request_id, []).extend(event.token_ids)
    return output


def measure(arguments: argparse.Namespace, *, deterministic: bool, greedy: bool) -> dict[str, Any]:
    """Compare one row with eight, with a budget small enough that eviction goes on all the time."""
    options: dict[str, Any] = {
        "model": arguments.model,
        "kv_budget": str(arguments.kv_budget),
        "threads": arguments.threads,
        "deterministic": deterministic,
    }
    outputs = []
    for rows in (1, 8):
        engine = load_engine(EngineOptions(max_inflight=rows, **options))
        vocab_size = engine.facts.spec.vocab_size
        outputs.append(run(engine, make_requests(arguments.requests, vocab_size=vocab_size, greedy=greedy)))
    alone, beside = outputs
    flips = sum(alone[key] != beside[key] for key in alone)
    return {"deterministic": deterministic, "greedy": greedy, "requests": len(alone), "flips": flips}


def main() -> None:
    """Measure greedy and sampled, with and without --deterministic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--kv-budget", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(arguments, deterministic=d, greedy=g) for d in (False, True) for g in (True, False)]
    measured = {"model": arguments.model, "kv_budget": arguments.kv_budget, "rows": rows}
    write_record("bench.flips", measured, arguments.out)


if __name__ == "__main__":
    main()
