"""Record what `trimkv eval` says of the built-in model: recall with a full cache and at several budgets.

python -m trimkv_cli.bench.recall --out kernels/bench/results/recall-mini.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from trimkv_cli.bench.record import write_record

COMMANDS = (
    "--context 1000 --policies full,gates --budgets 32,64,128 --samples 400",
    "--context 1000 --policies streaming,random --budgets 32,64,128 --samples 50",
    "--context 2000 --policies full --samples 400",
)
_EVAL = "eval {model} --tasks recall {command} --seed {seed} --json -q"


def main() -> None:
    """Run the commands and keep their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    measured = []
    for command in COMMANDS:
        said = _EVAL.format(model=arguments.model, command=command, seed=arguments.seed)
        done = subprocess.run([sys.executable, "-m", "trimkv_cli", *said.split()], capture_output=True, check=True)
        rows += json.loads(done.stdout)["rows"]
        measured.append(f"trimkv {said}")
    write_record("trimkv_cli.bench.recall", {"measured": measured, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
