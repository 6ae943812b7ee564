"""One stage of `gpu_run.py`: its checks one after the other, each with what it showed as rows of JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Where and how large a stage runs; `scratch` is a folder of its own."""

    device: torch.device
    tiny: bool
    scratch: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What one look at one thing showed."""

    check: str
    ok: bool
    facts: Facts = field(default_factory=dict)


Check = Callable[[Setting], Iterator[Evidence]]


def wait_for(device: torch.device) -> None:
    """Return when a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def not_shown(check: str, why: str) -> Evidence:
    """Say of a check that it cannot be made here, which is no failure and no pass."""
    return Evidence(check=check, ok=True, facts={"not_shown": why})


def wanted(value: float, *, least: float | None = None, most: float | None = None, form: str = "{:,.0f}") -> Facts:
    """Put what was measured beside what is wanted of it: a speed that misses it is a fact, no check that failed."""
    sign, bound = ("≥", least) if least is not None else ("≤", most)
    assert bound is not None, "something is wanted"
    met = value >= bound if least is not None else value <= bound
    return {"measured": form.format(value), "wanted": f"{sign} {form.format(bound)}", "met": met}


class Recorder:
    """Append rows to a file, each at once."""

    def __init__(self, file: IO[str], about: dict[str, Any]) -> None:
        self._file = file
        self._about = about
        self._since = time.monotonic()
        self.failed = False

    def push(self, evidence: Evidence) -> None:
        now = time.monotonic()
        row = {**self._about, "check": evidence.check, "ok": evidence.ok, **evidence.facts}
        row["seconds"] = round(now - self._since, 2)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._since = now
        self.failed |= not evidence.ok


def run_check(check: Check, setting: Setting, recorder: Recorder) -> None:
    """Record what a check shows; one that breaks, or that shows nothing, has failed."""
    shown = 0
    try:
        for evidence in check(setting):
            recorder.push(evidence)
            shown += 1
    except Exception as error:  # noqa: BLE001  whatever it is, the other checks still have something to show
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        recorder.push(Evidence(check=check.__name__, ok=False, facts={"error": said[:300]}))
        return
    if not shown:
        recorder.push(Evidence(check=check.__name__, ok=False, facts={"error": "it showed nothing"}))


def require_compiled_kernels() -> None:
    """Refuse to call Triton's interpreter a GPU."""
    assert "TRITON_INTERPRET" not in os.environ
    try:
        import triton
    except ImportError:
        return
    assert not triton.knobs.runtime.interpret


def main() -> int:
    """Run the checks of the stage that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--commit")
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    require_compiled_kernels()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    checks: tuple[Check, ...] = importlib.import_module(f"bench.gpu_stages.{arguments.name}").CHECKS
    scratch = arguments.out / f"{arguments.run}-{arguments.name}".replace(":", "")
    scratch.mkdir()
    device = torch.device("cuda", 0) if arguments.device == "cuda" else torch.device("cpu")
    setting = Setting(device=device, tiny=arguments.tiny, scratch=scratch)
    with (arguments.out / "rows.jsonl").open("a", encoding="utf-8") as file:
        about = {"run": arguments.run, "commit": arguments.commit, "stage": arguments.number}
        recorder = Recorder(file, {name: value for name, value in about.items() if value is not None})
        for check in checks:
            run_check(check, setting, recorder)
    return int(recorder.failed)


if __name__ == "__main__":
    sys.exit(main())
