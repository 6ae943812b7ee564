"""Summarize a text of three times the model's positions both ways, and record that memory stays flat.

python -m bench.long_text --out kernels/bench/results/long-text-cpu.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from bench.record import write_record

_EVERY_S = 0.25


def make_text(lines: int) -> str:
    """Write numbered notes, about 39 tokens of mini's a line."""
    return "".join(f"Note {i}: the box {i} is in room {i * 7}. We walked along the river.\n" for i in range(lines))


def measure(path: Path, overflow: str, *, kv_budget: int, threads: int) -> dict[str, Any]:
    """Run the command, look at its resident memory while it runs, and keep what it says of itself."""
    command = [
        *("summarize", str(path), "--on-overflow", overflow, "--kv-budget", str(kv_budget), "--max-inflight", "1"),
        *("-n", "64", "--greedy", "--threads", str(threads), "--json", "-q"),
    ]
    process = subprocess.Popen([sys.executable, "-m", "trimkv_cli", *command], stdout=subprocess.PIPE)
    started, rss = time.perf_counter(), []
    while process.poll() is None:
        rss.append(psutil.Process(process.pid).memory_info().rss)
        time.sleep(_EVERY_S)
    assert process.stdout is not None
    record = json.loads(process.stdout.read())
    own, half = record["trimkv"], rss[len(rss) // 2 :]
    return {
        "overflow": overflow,
        "prompt_tokens": record["usage"]["prompt_tokens"],
        "parts": own["parts"],
        "seconds": time.perf_counter() - started,
        "kv_bytes": own["memory"]["kv_bytes"],
        "rss_bytes_at_half": half[0],
        "rss_bytes_growth_after_half": max(half) - half[0],
        "rss_bytes_peak": max(rss),
    }


def main() -> None:
    """Measure both ways and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=5300)
    parser.add_argument("--kv-budget", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sizes = {"kv_budget": arguments.kv_budget, "threads": arguments.threads}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.txt"
        path.write_text(make_text(arguments.lines))
        rows = [measure(path, overflow, **sizes) for overflow in ("rebase", "map-reduce")]
    write_record("bench.long_text", {"model": "mini", **sizes, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
