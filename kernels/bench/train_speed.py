"""Tokens per second of `gates train`, beside another commit's, in turns.

python -m bench.train_speed MODEL --data FILE.jsonl [--beside COMMIT] [--steps 12] [--turns 3] [--out FILE]

Each turn trains with an evicting student from nothing, on the same documents, and takes what its last line
says. The attention steps, which run no student, are measured beside it.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.record import unpacked, write_record

_ROOT = Path(__file__).parents[2]
_STUDENT = "--student evicting --memory-size 128 --context 1536 --hidden 128 --accumulate 1 --log-every 1"
_SAID = re.compile(r"step (\d+)/\d+ .* ([\d,]+) tok/s")


def main() -> None:
    """Train in turns and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--beside", metavar="COMMIT", help="called before")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    common = [given.model, "--data", str(given.data.resolve()), *_STUDENT.split(), "--threads", str(given.threads)]
    common += ["--steps", str(given.steps)]
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "now": (_ROOT, common),
            "now, attention steps": (_ROOT, [*common, "--attention-steps", str(given.steps)]),
        }
        if given.beside:
            sides["before"] = (unpacked(given.beside, Path(folder)), common)
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(given.turns):
            for name, (root, arguments) in sides.items():
                speeds[name].append(_speed(arguments, root))
    asked = {"model": Path(given.model).name, "beside": given.beside, "steps": given.steps, "threads": given.threads}
    medians = {name: round(statistics.median(each)) for name, each in speeds.items()}
    write_record(
        "bench.train_speed", {**asked, "options": _STUDENT, "tokens_per_s": speeds, "median": medians}, given.out
    )


def _speed(arguments: Sequence[str], root: Path) -> float:
    """Return the tokens per second that one training says of itself when it has ended."""
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run(
            [sys.executable, "-m", "trimkv_cli", "gates", "train", *arguments, "-o", str(Path(out) / "gates")],
            env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"},
            cwd=root,  # where `-m` looks first
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        sys.exit(done.stderr)
    said = _SAID.findall(done.stderr)
    return float(said[-1][1].replace(",", ""))


if __name__ == "__main__":
    main()
