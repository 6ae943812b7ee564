"""Kill a batch job again and again at random moments, resume it each time, and compare it with an undisturbed run.

python -m bench.kills --out kernels/bench/results/kills-mini.json
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.record import write_record
from trimkv_cli.jobs.reading import open_input


def write_job(path: Path, lines: int) -> None:
    """Write chats whose answers have 1 to 24 tokens."""
    with path.open("w") as source:
        for n in range(lines):
            messages = [{"role": "user", "content": f"Remember that I have {n} cards."}]
            body = {"messages": messages, "max_tokens": 1 + n % 24, "ignore_eos": True}
            line = {"custom_id": f"r{n}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            source.write(json.dumps(line) + "\n")


def start(source: Path, output: Path, *flags: str) -> subprocess.Popen[bytes]:
    """Begin, or resume, the job."""
    command = [sys.executable, "-m", "trimkv_cli", "run", str(source), "-o", str(output), "--threads", "1", "-q"]
    return subprocess.Popen([*command, "--kv-budget", "32", *flags])


def kill_once(source: Path, output: Path, rng: random.Random, flags: list[str]) -> bool:
    """Run until some time after the first new record, or between start and that, then kill; False when it was done."""
    process = start(source, output, *flags)
    if rng.random() < 0.2:
        time.sleep(rng.random() * 2)  # while it loads, scans and repairs
    else:
        before = _size(output)
        while process.poll() is None and _size(output) == before:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
    ended = process.poll() is not None
    process.kill()
    process.wait()
    return not ended


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def read_answers(output: Path, *, whole_lines: bool) -> tuple[dict[str, Any], int]:
    """Return the choices, or whole lines, by id, and how many ids stand there more than once; all has to be JSON."""
    with open_input(str(output)) as stream:
        lines = list(stream)
    records = [json.loads(line) for line in lines]
    answers = {
        record["custom_id"]: line.decode() if whole_lines else record["response"]["body"]["choices"]
        for record, line in zip(records, lines, strict=True)
    }
    return answers, len(records) - len(answers)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run both jobs and compare."""
    rng, source = random.Random(arguments.seed), folder / "in.jsonl"
    write_job(source, arguments.lines)
    flags = ["--deterministic"] if arguments.deterministic else []
    output = folder / f"killed{arguments.suffix}"
    kills = sum(kill_once(source, output, rng, flags) for _ in range(arguments.kills))
    assert start(source, output, *flags).wait() == 0, "the last run ends by itself"
    answers, doubled = read_answers(output, whole_lines=arguments.deterministic)
    quiet = folder / "quiet.jsonl"
    assert start(source, quiet, *flags).wait() == 0
    undisturbed, _ = read_answers(quiet, whole_lines=arguments.deterministic)
    return {
        "lines": arguments.lines,
        "kills": kills,
        "runs": arguments.kills + 1,
        "output": arguments.suffix,
        "deterministic": arguments.deterministic,
        "compared": "whole lines" if arguments.deterministic else "choices",
        "answered": len(answers),
        "doubled_ids": doubled,
        "missing_ids": len(undisturbed.keys() - answers.keys()),
        "other_answers": sum(answers.get(key) != choices for key, choices in undisturbed.items()),
        "left_behind": sorted(path.name for path in folder.iterdir()),
    }


def main() -> None:
    """Measure and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suffix", default=".jsonl", help=".jsonl, .jsonl.gz or .jsonl.zst")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(arguments, Path(folder))
    write_record("bench.kills", measured, arguments.out)


if __name__ == "__main__":
    main()
