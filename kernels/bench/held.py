"""Run requests of very different lengths under a budget, each case in a process of its own, and record whether it held.

python -m bench.held --out kernels/bench/results/held-cpu.json
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import Request, SamplingParams

# model, dtype, quantize, prompts, longest prompt, rows that the budget has room for
CASES: dict[str, tuple[str, str, str, int, int, int]] = {
    "64 prompts of 1 to 50,000 tokens": ("llama, tiny", "fp32", "none", 64, 50_000, 3),
    "88M fp32": ("qwen3, 88M", "fp32", "none", 4, 2_000, 2),
    "88M fp32, packed weights": ("qwen3, 88M", "fp32", "none", 8, 2_000, 4),
    "88M bf16": ("qwen3, 88M", "bf16", "none", 4, 2_000, 2),
    "88M int8": ("qwen3, 88M", "bf16", "int8", 4, 2_000, 2),
    "88M nf4": ("qwen3, 88M", "bf16", "nf4", 4, 2_000, 2),
}


def lengths(count: int, longest: int) -> list[int]:
    """Spread lengths evenly by magnitude from 1 to `longest`, in an order of no meaning."""
    spread = [round(longest ** (index / (count - 1))) for index in range(count)]
    random.Random(0).shuffle(spread)
    return spread


def requests(count: int, longest: int) -> Iterator[Request]:
    """Yield one greedy request of each length."""
    for index, length in enumerate(lengths(count, longest)):
        ids = tuple(3 + (index * 31 + n * 7) % 90 for n in range(length))
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        yield Request(id=str(index), prompt_token_ids=ids, params=params)


def run_case(folder: Path, case: tuple[str, str, str, int, int, int]) -> dict[str, Any]:
    """Load with a budget that holds so many rows and no more, answer everything, and return plan and peaks."""
    import torch

    from trimkv_cli.loading.loader import load_engine, plan_for
    from trimkv_cli.loading.sources import find_source

    _, dtype, quantize, count, longest, rows = case
    roomy = EngineOptions(
        model=str(folder),
        offline=True,
        budget="64GiB",
        max_inflight=rows,
        dtype=dtype,
        quantize=quantize,
        device="cpu",
        kv_budget="256",
        prefill_chunk=256,
        threads=2,
    )
    budget = plan_for(find_source(roomy, weights=True), roomy, torch.device("cpu")).run.total_bytes
    engine = load_engine(replace(roomy, budget=str(budget), max_inflight=None))
    answered, middle = 0, 0
    for event in engine.generate(requests(count, longest)):
        if event.finish_reason == "length":
            answered += 1
            middle = engine.peak_bytes if answered == count // 2 else middle
    plan = engine.facts.plan
    return {
        "rows": plan.run.rows,
        "answered": answered,
        "planned_bytes": plan.run.total_bytes,
        "peak_rss_bytes": engine.peak_bytes,
        "peak_over_planned": engine.peak_bytes / plan.run.total_bytes,
        "growth_in_second_half_bytes": engine.peak_bytes - middle,
        "undone_steps": engine.stats.undone_steps,
        "runtime_bytes": plan.run.part_bytes("runtime"),
        "slack_bytes": plan.run.part_bytes("slack"),
    }


def main() -> None:
    """Run every case and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(arguments.folder, CASES[arguments.case])))
        return
    from bench.memory import MODELS, save_model
    from bench.record import write_record

    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            place = Path(folder) / case[0].replace(", ", "-")
            if not place.exists():
                save_model({**MODELS[case[0]], "max_position_embeddings": 65536}, place)
            command = [sys.executable, "-m", "bench.held", "--case", name, "--folder", str(place)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append({"case": name, **json.loads(done.stdout.splitlines()[-1])})
    write_record("bench.held", {"results": results}, arguments.out)


if __name__ == "__main__":
    main()
