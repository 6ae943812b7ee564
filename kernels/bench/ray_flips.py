"""Count the lines whose tokens differ between one process and the workers of a Ray cluster.

python -m bench.ray_flips --out kernels/bench/results/flips-ray.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.record import write_record

_WORKERS = 2


def write_job(path: Path, lines: int, *, vocab_size: int, greedy: bool) -> None:
    """Write prompts of 4 to 60 random tokens, with 32 tokens to generate."""
    rng = random.Random(0)
    with path.open("w") as source:
        for n in range(lines):
            prompt = [rng.randrange(vocab_size) for _ in range(rng.randrange(4, 61))]
            line = {"id": f"r{n}", "prompt_token_ids": prompt, "temperature": 0.0 if greedy else 1.0}
            more = {"seed": n, "max_tokens": 32, "ignore_eos": True, "return_token_ids": True}
            source.write(json.dumps({**line, **more}) + "\n")


def run_job(source: Path, output: Path, *flags: str) -> dict[str, list[int]]:
    """Run the job; return each line's output ids."""
    command = [sys.executable, "-m", "trimkv_cli", "run", str(source), "-o", str(output), "-q", *flags]
    subprocess.run(command, check=True)
    with output.open() as stream:
        records = [json.loads(line) for line in stream]
    return {record["custom_id"]: record["response"]["body"]["choices"][0]["token_ids"] for record in records}


def measure(arguments: argparse.Namespace, folder: Path, *, greedy: bool, deterministic: bool) -> dict[str, Any]:
    """Run one job both ways."""
    name = f"{greedy}-{deterministic}"
    source = folder / f"{name}.jsonl"
    write_job(source, arguments.lines, vocab_size=arguments.vocab_size, greedy=greedy)
    flags = ["--model", arguments.model, "--kv-budget", str(arguments.kv_budget), "--threads", "1"]
    flags += ["--deterministic"] if deterministic else []
    one = run_job(source, folder / f"{name}-one.jsonl", *flags)
    cores = str(max(1, (os.cpu_count() or 1) // _WORKERS))
    many = run_job(source, folder / f"{name}-ray.jsonl", *flags, "--engine", "ray", "--cpus-per-worker", cores)
    flips = sum(one[key] != many.get(key) for key in one)
    return {"deterministic": deterministic, "greedy": greedy, "lines": len(one), "flips": flips}


def main() -> None:
    """Measure greedy and sampled, and sampled with --deterministic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--kv-budget", type=int, default=16)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure(arguments, Path(folder), greedy=greedy, deterministic=deterministic)
            for greedy, deterministic in ((True, False), (False, False), (False, True))
        ]
    measured = {"model": arguments.model, "workers": _WORKERS, "kv_budget": arguments.kv_budget, "rows": rows}
    write_record("bench.ray_flips", measured, arguments.out)


if __name__ == "__main__":
    main()
