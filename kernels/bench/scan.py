"""Measure how fast `trimkv run` passes over lines, and that its memory does not grow with their number.

python -m bench.scan --out kernels/bench/results/scan.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.record import write_record
from trimkv_cli.engine.devices import peak_rss
from trimkv_cli.jobs.lines import Rules
from trimkv_cli.jobs.reading import LineReader, open_input
from trimkv_cli.jobs.resuming import read_earlier, remembering
from trimkv_cli.jobs.selection import Selection, parse_lines

STAGES = ("read", "parse", "scan_output", "resume")


def write_files(folder: Path, lines: int) -> None:
    """Write an input of short lines, and an output that answers all of them."""
    with (folder / "in.jsonl").open("w") as source, (folder / "out.jsonl").open("w") as output:
        for n in range(1, lines + 1):
            source.write('{"custom_id": "request-%d", "prompt": "Hello number %d", "max_tokens": 4}\n' % (n, n))  # noqa: UP031
            output.write(json.dumps(_answer(n)) + "\n")


def _answer(line: int) -> dict[str, Any]:
    usage = {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    message = {"role": "assistant", "content": "I am fine, thank you.", "refusal": None}
    choices = [{"index": 0, "message": message, "finish_reason": "length", "logprobs": None}]
    extra = {"line": line, "seed": 5, "kv_budget": 64, "prefill_chunk": 512, "warnings": []}
    body = {"id": "chatcmpl-0", "object": "chat.completion", "choices": choices, "usage": usage, "trimkv": extra}
    response = {"status_code": 200, "request_id": "req_0", "body": body}
    return {"id": "batch_req_0", "custom_id": f"request-{line}", "response": response, "error": None}


def run_stage(stage: str, folder: Path) -> dict[str, Any]:
    """Run one stage in this process; return its rate and what the process took at most."""
    started = time.perf_counter()
    source = open_input(str(folder / "in.jsonl"))
    reader = LineReader(remembering(source, lambda _count, _sha256: None))
    if stage == "read":
        count = _count(reader)
    elif stage == "parse":
        count = _count(parse_lines(reader, Rules()))
    else:
        earlier = read_earlier(folder / "out.jsonl")
        count = earlier.records
        if stage == "resume":
            left = _count(parse_lines(reader, Rules(), Selection(earlier=earlier)))
            assert left == 0, "every line has its answer"
    elapsed = time.perf_counter() - started
    return {"lines": count, "lines_per_s": count / elapsed, "peak_rss_bytes": peak_rss()}


def _count(items: Iterable[object]) -> int:
    return sum(1 for _ in items)


def measure(sizes: tuple[int, int]) -> dict[str, Any]:
    """Run every stage in a process of its own, over a short and a long file."""
    found: dict[str, Any] = {stage: {} for stage in STAGES}
    for lines in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_files(Path(folder), lines)
            for stage in STAGES:
                command = [sys.executable, "-m", "bench.scan", "--stage", stage, "--folder", folder]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[stage][str(lines)] = json.loads(done.stdout)
    small, large = map(str, sizes)
    for stage in found.values():
        stage["rss_growth_bytes"] = stage[large]["peak_rss_bytes"] - stage[small]["peak_rss_bytes"]
    return found


def main() -> None:
    """Measure and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=10_000)
    parser.add_argument("--many", type=int, default=1_000_000)
    parser.add_argument("--stage", choices=STAGES, help="run one stage here, for the other processes")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(run_stage(arguments.stage, arguments.folder)))
        return
    write_record("bench.scan", measure((arguments.few, arguments.many)), arguments.out)


if __name__ == "__main__":
    main()
