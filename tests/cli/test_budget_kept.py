"""A budget that was not held is an error, however good the answers are."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimkv_cli import app
from trimkv_cli.engine.engine import Engine
from trimkv_cli.jobs.progress import Summary

BUDGET = 2**30


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let every engine report a peak above the budget that the tests give."""
    monkeypatch.setattr(Engine, "peak_bytes", property(lambda _: BUDGET + 1))
    with Path(os.devnull).open(encoding="utf-8") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield


@pytest.mark.usefixtures("peak")
@pytest.mark.parametrize("quiet", [[], ["-q"]])
@pytest.mark.parametrize("command", ["ask", "run", "summarize", "inspect"])
def test_a_budget_that_was_not_held_is_exit_code_1(
    command: str, quiet: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Catches 1,111 MiB of 900 with exit code 0, and with -q not even a word."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "My cat is", "max_tokens": 2}\n')
    (tmp_path / "in.txt").write_text("My cat is called Zubo.\n")
    line = {
        "ask": ["ask", "hi", "-n", "2"],
        "run": ["run", str(tmp_path / "in.jsonl"), "--summary-json", str(tmp_path / "summary.json")],
        "summarize": ["summarize", str(tmp_path / "in.txt"), "-n", "2"],
        "inspect": ["inspect", "hi", "-n", "2", "--json"],
    }[command]
    assert app._exit_code([*line, *quiet, "--budget", str(BUDGET), "--threads", "1"]) == 1
    out, err = capfd.readouterr()
    assert out.strip(), "the answer is there all the same"
    assert "error: the budget was not held: 1.000000001 GiB at the peak, of 1.000000000 GiB\n" in err
    if command == "run":
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert (summary["budget_bytes"], summary["peak_bytes"]) == (BUDGET, BUDGET + 1)


def test_a_summary_knows_the_largest_peak() -> None:
    """Catches a worker's breach that a later record of another worker hides."""
    summary = Summary()
    for peak in (90, 110, 95):
        summary.note_memory({"budget": {"bytes": 100}, "memory": {"peak_bytes": peak}})
    assert summary.over_budget
    assert summary.peak_bytes == 110
    summary = Summary()
    summary.note_memory({"budget": {"bytes": None}, "memory": {"peak_bytes": 5}})
    assert not summary.over_budget
