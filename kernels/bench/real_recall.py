"""Record what a real model remembers of real text that its gates never saw: `trimkv eval`, row after row.

python -m bench.real_recall smollm2-135m-instruct --out kernels/bench/results/recall-smollm2.json

The texts are those of `bench.held_out`. What a record holds already is not asked again, so that a run that was stopped
goes on. All rows of a table have the same questions, chunk and pins.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.held_out import write_texts
from bench.record import run_trimkv, write_record

ALL = "gates,keydiff,streaming,protected,random"
MOST = "gates,keydiff,streaming,protected"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One comparison: its name, what `trimkv eval` is asked, and the policies, each a call of its own."""

    name: str
    asked: str
    policies: str


TABLES = (
    Table(name="needle", asked="--tasks needle --context 700 --samples 200", policies=ALL),
    Table(name="prose", asked="--tasks ppl --context 8000", policies=MOST),
    Table(name="prose pinned", asked="--tasks ppl --context 8000 --pin recent:96", policies="gates"),
    Table(name="rules", asked="--tasks instructions --context 2000 --samples 40", policies="gates,streaming"),
    Table(
        name="rules pinned",
        asked="--tasks instructions --context 2000 --samples 40 --pin system",
        policies="gates,streaming",
    ),
    Table(
        name="ends pinned",
        asked="--tasks needle --context 700 --samples 200 --pin prompt:10%",
        policies="gates,keydiff",
    ),
    Table(name="longer", asked="--tasks needle --context 2000 --samples 104", policies=MOST),
    Table(name="longest", asked="--tasks needle --context 4000 --samples 104", policies=MOST),
    Table(name="multi-turn", asked="--tasks multi-turn --context 700 --samples 104", policies=MOST),
    Table(name="whole chunk", asked="--tasks needle --context 700 --samples 200 --prefill-chunk 512", policies="gates"),
)
# A whole cache holds all, whatever is pinned or however it is read: these tables have its row already.
_WITHOUT_FULL = ("prose pinned", "rules pinned", "ends pinned", "whole chunk")


def main() -> None:
    """Ask what the record does not hold yet, and write it after each call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--gates", default="auto", help="a folder; without trained gates their rows are left out")
    parser.add_argument("--tables", default=",".join(table.name for table in TABLES))
    parser.add_argument("--budgets", default="128,256")
    parser.add_argument("--seed", type=int, default=2511)
    parser.add_argument("--texts", type=Path, default=Path("build/held-out"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    texts = " ".join(f"--text {path}" for path in write_texts(arguments.texts))
    record: dict[str, Any] = json.loads(arguments.out.read_bytes()) if arguments.out.is_file() else {"rows": []}
    done = {(row["table"], row["policy"]) for row in record["rows"]}
    wanted = arguments.tables.split(",")
    for table in (table for table in TABLES if table.name in wanted):
        policies = [policy for policy in ("full", *table.policies.split(",")) if (table.name, policy) not in done]
        if table.name in _WITHOUT_FULL:
            policies = [policy for policy in policies if policy != "full"]
        if arguments.gates == "none":
            policies = [policy for policy in policies if policy != "gates"]
        for policy in policies:
            chunk = "" if "--prefill-chunk" in table.asked else "--prefill-chunk 64 "
            asked = f"{table.asked} {chunk}--policies {policy} --budgets {arguments.budgets} --seed {arguments.seed}"
            gates = f"--gates {arguments.gates} " if policy == "gates" else ""
            said = f"eval {arguments.model} {gates}{asked}"
            rows = run_trimkv(f"{said} {texts} --json -q".split())["rows"]
            record["rows"] += [{"table": table.name, "asked": f"trimkv {said}", **row} for row in rows]
            write_record("bench.real_recall", {"model": arguments.model, "rows": record["rows"]}, arguments.out)


if __name__ == "__main__":
    main()
