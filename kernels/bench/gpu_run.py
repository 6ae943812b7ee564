"""Check trimkv on a GPU in one run of bounded length, from a bare copy of this repository.

    python3 kernels/bench/gpu_run.py --out DIR [--limit 570] [--stages 0-4]
    python3 kernels/bench/gpu_run.py --out DIR --device cpu --tiny      # the rehearsal, without a GPU

Every stage is a process of its own with a limit of its own. What it finds goes to DIR/rows.jsonl line by line, what it
prints to DIR/log.txt, and DIR/summary.md is written anew after each stage. A later run into the same DIR adds to all
three. Exit code 1: a stage failed, was not reached, or showed nothing; a speed that is not what is wanted is a fact.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = (ROOT, ROOT / "kernels", ROOT / "tests")
LEAST_S = 10.0  # less is left: a stage would not get beyond its imports
CPU_TAKES = 3.0  # a busy machine without a GPU is given so many times as long for a stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One module of `gpu_stages`, how long it may take on a GPU, and how long it has when those before it are slow."""

    number: int
    name: str
    limit_s: float
    least_s: float


# What is lost last when time runs out is what matters least.
STAGES = (
    Stage(number=0, name="env", limit_s=60, least_s=15),
    Stage(number=1, name="smoke", limit_s=120, least_s=40),
    Stage(number=2, name="engine", limit_s=180, least_s=50),
    Stage(number=3, name="mini", limit_s=90, least_s=30),
    Stage(number=4, name="speed", limit_s=150, least_s=90),
    Stage(number=5, name="kernels", limit_s=120, least_s=30),
    Stage(number=6, name="memory", limit_s=90, least_s=40),
    Stage(number=7, name="paper", limit_s=120, least_s=60),
    Stage(number=8, name="suite", limit_s=150, least_s=40),
    Stage(number=9, name="tools", limit_s=150, least_s=30),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a stage ended: `trouble` is empty when all is well."""

    stage: Stage
    seconds: float
    rows: Sequence[dict[str, Any]]
    trouble: str


def command_for(stage: Stage, arguments: argparse.Namespace) -> list[str]:
    """Return the command of a stage's process."""
    command = [sys.executable, "-W", "default", "-m", "bench.gpu_stages.stage", stage.name]
    command += ["--number", str(stage.number), "--out", str(arguments.out)]
    command += ["--run", arguments.run, "--device", arguments.device]
    command += ["--commit", arguments.commit] if arguments.commit else []
    return [*command, "--tiny"] if arguments.tiny else command


def environment() -> dict[str, str]:
    """Return what a stage's process sees: this copy of the code, no network, and kernels that are compiled."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(map(str, SOURCE_ROOTS)),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def run_stage(stage: Stage, command: Sequence[str], limit_s: float, log: IO[bytes]) -> str:
    """Run a stage's process to its end or limit, with all that it starts; return what went wrong."""
    log.write(f"\n== stage {stage.number}, {stage.name}: {' '.join(command)}\n".encode())
    log.flush()
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment(), cwd=ROOT
    )
    try:
        code = child.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"killed after {limit_s:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return f"exit code {code}" if code else ""


def read_rows(path: Path, start: int) -> list[dict[str, Any]]:
    """Return the rows from byte `start` on; one that was torn by a kill counts as failed, and its line is ended."""
    rows = []
    with path.open("a+b") as file:
        file.seek(start)
        for line in file.read().splitlines(keepends=True):
            try:
                rows.append(json.loads(line))
            except ValueError:
                rows.append({"check": "a torn row", "ok": False})
                file.write(b"" if line.endswith(b"\n") else b"\n")
    return rows


def judge(stage: Stage, trouble: str, seconds: float, rows: Sequence[dict[str, Any]]) -> Outcome:
    """Say how a stage ended: nothing shown is nothing passed."""
    failed = [row["check"] for row in rows if not row["ok"]]
    told = [trouble] if trouble else []
    told += [f"{len(failed)} of {len(rows)} failed: {', '.join(failed)}"] if failed else []
    told += ["no evidence"] if all("not_shown" in row for row in rows) and not trouble else []
    return Outcome(stage=stage, seconds=seconds, rows=rows, trouble="; ".join(told))


def limit_for(stage: Stage, later: Iterable[Stage], left: float, slower: float) -> float:
    """Return how long a stage may take of the seconds that are left, on a machine that takes so many times as long."""
    spare = left - sum(other.least_s for other in later)
    return min(left, slower * stage.limit_s, max(spare, stage.least_s))


def run_all(stages: Iterable[Stage], arguments: argparse.Namespace, deadline: float) -> Iterator[Outcome]:
    """Run one stage after the other while time is left, each with no more of it than leaves later ones the least."""
    rows, coming = arguments.out / "rows.jsonl", list(stages)
    with (arguments.out / "log.txt").open("ab") as log:
        while coming:
            stage = coming.pop(0)
            left = deadline - time.monotonic()
            if left < LEAST_S:
                yield judge(stage, f"not reached: {max(0.0, left):.0f} s were left", 0.0, ())
                continue
            started, before = time.monotonic(), rows.stat().st_size if rows.exists() else 0
            limit_s = limit_for(stage, coming, left, CPU_TAKES if arguments.device == "cpu" else 1.0)
            trouble = run_stage(stage, command_for(stage, arguments), limit_s, log)
            yield judge(stage, trouble, time.monotonic() - started, read_rows(rows, before))


def summary(outcomes: Sequence[Outcome], arguments: argparse.Namespace) -> str:
    """Return what happened so far as Markdown."""
    lines = [f"# Run {arguments.run} on {arguments.device}{', tiny' if arguments.tiny else ''}", ""]
    lines += [f"commit: {arguments.commit or 'not told'}", "", "| stage | result | s | checks |", "|---|---|---|---|"]
    for done in outcomes:
        result = done.trouble.replace("|", "/") or "ok"
        lines.append(
            f"| {done.stage.number} {done.stage.name} | {result} | {done.seconds:.1f} | {counted(done.rows)} |"
        )
    if targets := [row for done in outcomes for row in done.rows if "wanted" in row]:
        lines += ["", "|  | measured | wanted |", "|---|---|---|", *map(wanted_line, targets)]
    for done in outcomes:
        lines += ["", f"## {done.stage.number} {done.stage.name}", ""]
        lines += [f"- {_said(row)} {row['check']}: {_facts(row)}" for row in done.rows]
    return "\n".join(lines) + "\n"


def counted(rows: Sequence[dict[str, Any]]) -> str:
    """Say how many checks were passed, and how many could not be made here."""
    missing = sum("not_shown" in row for row in rows)
    passed = sum(row["ok"] for row in rows) - missing
    return f"{passed} of {len(rows)}" + (f", {missing} not shown" if missing else "")


def wanted_line(row: dict[str, Any]) -> str:
    """Return a line of a table in Markdown: what was measured, and what is wanted of it."""
    return f"| {row['check']} | {row['measured']} | {row['wanted']}{'' if row['met'] else ': missed'} |"


def _said(row: dict[str, Any]) -> str:
    if "not_shown" in row:
        return "not shown:"
    return "ok" if row["ok"] else "**failed**"


def _facts(row: dict[str, Any]) -> str:
    hidden = ("run", "commit", "stage", "check", "ok")
    return ", ".join(f"{name} {value}" for name, value in row.items() if name not in hidden)


def parse_stages(text: str) -> tuple[Stage, ...]:
    """Read `0-3`, `2` or `1,3`."""
    wanted: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of stages: 0-3, 2 or 1,3")
        wanted |= set(range(int(first), int(last or first) + 1))
    known = {stage.number: stage for stage in STAGES}
    if not wanted or not wanted <= known.keys():
        raise argparse.ArgumentTypeError(f"the stages are {min(known)}-{max(known)}")
    return tuple(known[number] for number in sorted(wanted))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--limit", type=float, default=570, metavar="SECONDS", help="for all stages together")
    parser.add_argument("--stages", type=parse_stages, default=STAGES, metavar="0-4")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a rehearsal")
    parser.add_argument("--commit", default="", help="of this copy, where no git can tell")
    parsed = parser.parse_args(arguments)
    parsed.out = parsed.out.resolve()
    parsed.run = f"{time.strftime('%Y-%m-%dT%H:%M:%S')}-{os.getpid()}"
    return parsed


def main() -> int:
    """Run the stages; say the results on stdout as they come."""
    deadline = time.monotonic()
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a stage's processes end with this one
    arguments.out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    page = arguments.out / "summary.md"
    earlier = page.read_text(encoding="utf-8") if page.exists() else ""
    for outcome in run_all(arguments.stages, arguments, deadline + arguments.limit):
        outcomes.append(outcome)
        page.write_text("\n".join(filter(None, (summary(outcomes, arguments), earlier))), encoding="utf-8")
        print(f"{outcome.stage.number} {outcome.stage.name}: {outcome.trouble or 'ok'}, {outcome.seconds:.1f} s, "
              f"{counted(outcome.rows)} checks", flush=True)  # fmt: skip
    return int(any(outcome.trouble for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
