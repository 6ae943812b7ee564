"""Record what `trimkv eval` says of the built-in model: recall at several budgets, and what other policies keep.

python -m trimkv_cli.bench.recall --out kernels/bench/results/recall-mini.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from trimkv_cli.bench.record import write_record

COMMAND = "eval mini --tasks recall --context 1000 --budgets 32,64,128 --samples 100 --seed 7 --json -q"


def main() -> None:
    """Run the command and keep its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    done = subprocess.run([sys.executable, "-m", "trimkv_cli", *COMMAND.split()], capture_output=True, check=True)
    measured = {"measured": f"trimkv {COMMAND}", **json.loads(done.stdout)}
    write_record("trimkv_cli.bench.recall", measured, arguments.out)


if __name__ == "__main__":
    main()
