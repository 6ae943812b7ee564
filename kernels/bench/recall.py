"""Record what `trimkv eval` says of the built-in model: recall with a full cache and at several budgets.

python -m bench.recall --out kernels/bench/results/recall-mini.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.record import run_trimkv, write_record

COMMANDS = (
    "--context 1000 --policies full,gates --budgets 32,64,128 --samples {questions}",
    "--context 1000 --policies streaming,random --budgets 32,64,128 --samples {few}",
    "--context 2000 --policies full --samples {questions}",
)
_EVAL = "eval {model} --tasks recall {command} --seed {seed} --logprob --json -q"


def main() -> None:
    """Run the commands and keep their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--questions", type=int, default=400, help="an eighth of them where all is forgotten")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    measured = []
    for command in COMMANDS:
        asked = command.format(questions=arguments.questions, few=max(1, arguments.questions // 8))
        said = _EVAL.format(model=arguments.model, command=asked, seed=arguments.seed)
        rows += run_trimkv(said.split())["rows"]
        measured.append(f"trimkv {said}")
    write_record("bench.recall", {"measured": measured, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
