"""CPU seconds that short commands take: what a shell loop pays for each start, beside another commit's.

python -m bench.start_cost [--beside COMMIT] [--runs 20] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bench.record import unpacked, write_record

_ROOT = Path(__file__).parents[2]
_COMMANDS = {
    "--version": ["--version"],
    "--help": ["--help"],
    "ask --help": ["ask", "--help"],
    "ask, its options read": ["ask", "--greedy", "--temperature", "1", "Why?"],  # refused after all else is parsed
    "plan": ["plan", "qwen3-4b-math", "-b", "80GiB", "--offline"],
}


def main() -> None:
    """Run every command of both in turns and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--beside", metavar="COMMIT", help="called before")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        roots = {"now": _ROOT}
        if given.beside:
            roots["before"] = unpacked(given.beside, Path(folder))
        spent = _measured(roots, given.runs)
    medians = {name: {root: round(statistics.median(times), 3) for root, times in each.items()} for name, each in spent}
    write_record("bench.start_cost", {"runs": given.runs, "median_cpu_s": medians}, given.out)


def _measured(roots: Mapping[str, Path], runs: int) -> list[tuple[str, dict[str, list[float]]]]:
    """Return each command with its CPU seconds, run by run, from each of the roots."""
    spent: dict[str, dict[str, list[float]]] = {name: {root: [] for root in roots} for name in _COMMANDS}
    for run in range(runs + 1):
        for name, arguments in _COMMANDS.items():
            for root, folder in roots.items():
                cpu_s = _cpu_s(arguments, folder)
                if run:  # the first one writes Python's compiled files
                    spent[name][root].append(cpu_s)
    return list(spent.items())


def _cpu_s(arguments: list[str], root: Path) -> float:
    """Return the user's and the system's time of one process, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "trimkv_cli", *arguments],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"},
        cwd=root,
        capture_output=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
