"""The runner of the GPU's checks: what it takes for passed, and what survives a stage that goes wrong."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_run
from bench.gpu_stages import smoke, stage
from bench.gpu_stages.stage import Evidence, Recorder, Setting
from trimkv_kernels import Operations, reference

STAGE = gpu_run.Stage(number=7, name="made-up", limit_s=30, least_s=1)
GREEN = 'print("talk"); rows.write(json.dumps({"check": "one", "ok": True}) + "\\n")'


def play(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, limit_s: float = 30) -> gpu_run.Outcome:
    """Run one stage that is this program, which may write to `rows`."""
    start = f"import json, os, sys, time; rows = open({str(folder / 'rows.jsonl')!r}, 'a', buffering=1)\n"
    monkeypatch.setattr(gpu_run, "CPU_TAKES", 1.0)
    monkeypatch.setattr(gpu_run, "command_for", lambda *_: [sys.executable, "-c", start + program])
    arguments = Namespace(out=folder, run="r", device="cpu", tiny=True, commit="")
    made_up = gpu_run.Stage(number=7, name="made-up", limit_s=limit_s, least_s=1)
    (outcome,) = gpu_run.run_all([made_up], arguments, time.monotonic() + 60)
    return outcome


def test_green_rows_are_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows of an earlier stage or run that count for this one, and talk that is lost."""
    (tmp_path / "rows.jsonl").write_text('{"check": "earlier", "ok": false}\n')
    outcome = play(GREEN, tmp_path, monkeypatch)
    assert not outcome.trouble
    assert [row["check"] for row in outcome.rows] == ["one"]
    assert "talk" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("program", "trouble"),
    [
        ("pass", "no evidence"),
        (GREEN + "; sys.exit(3)", "exit code 3"),
        (GREEN + "; os.abort()", "exit code -6"),
        (GREEN.replace("True", "False"), "1 of 1 failed: one"),
        (GREEN + """; rows.write('{"check": "tw')""", "1 of 2 failed: a torn row"),
    ],
)
def test_whatever_goes_wrong_is_no_pass(
    program: str, trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a stage that shows nothing, or ends wrongly after green rows, and passes."""
    outcome = play(program, tmp_path, monkeypatch)
    assert trouble in outcome.trouble
    arguments = Namespace(run="r", device="cpu", tiny=True, commit="")
    assert trouble in gpu_run.summary([outcome], arguments)
    assert (tmp_path / "rows.jsonl").read_bytes()[-1:] in (b"", b"\n")


def test_a_stage_past_its_limit_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a hang that costs the other stages their time, and a process that goes on holding the GPU."""
    program = f"""{GREEN}
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    outcome = play(program, tmp_path, monkeypatch, limit_s=3)
    assert outcome.trouble == "killed after 3 s"
    assert len(outcome.rows) == 1
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    until = time.monotonic() + 10
    while is_running(state):
        assert time.monotonic() < until
        time.sleep(0.05)


def is_running(state: Path) -> bool:
    """Say whether the process of a /proc/PID/stat is neither gone nor dead."""
    try:
        return state.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_stage_that_is_not_reached_has_not_passed(tmp_path: Path) -> None:
    """Catches a run that is green because its time was up."""
    arguments = Namespace(out=tmp_path, run="r", device="cpu", tiny=True, commit="")
    (outcome,) = gpu_run.run_all([STAGE], arguments, time.monotonic() + 1)
    assert "not reached" in outcome.trouble


def test_a_slow_stage_leaves_those_after_it_their_least() -> None:
    """Catches a compilation that takes the time of what it is compiled for, and a stage that is given none at all."""
    first, second = (gpu_run.Stage(number=n, name="s", limit_s=100, least_s=40) for n in range(2))
    assert gpu_run.limit_for(first, [second], 500, 1.0) == 100
    assert gpu_run.limit_for(first, [second], 120, 1.0) == 80
    assert gpu_run.limit_for(first, [second], 60, 1.0) == 40
    assert gpu_run.limit_for(first, [second], 30, 1.0) == 30
    assert gpu_run.limit_for(first, [second], 500, 3.0) == 300


def test_the_first_stages_have_time_in_a_run_of_five_minutes() -> None:
    """Catches limits that do not fit the first loan of a GPU."""
    assert sum(stage.least_s for stage in gpu_run.parse_stages("0-4")) <= 300
    assert sum(stage.least_s for stage in gpu_run.STAGES) <= 570


def test_every_stage_has_a_module_and_a_place() -> None:
    """Catches a name that only the GPU's machine finds to be wrong."""
    assert [one.number for one in gpu_run.STAGES] == list(range(len(gpu_run.STAGES)))
    for one in gpu_run.STAGES:
        assert find_spec(f"bench.gpu_stages.{one.name}")


def test_what_could_not_be_shown_is_neither_a_failure_nor_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a stage that looked at nothing and is green, or whose summary counts what was left out as passed."""
    hidden = GREEN.replace('"ok": True', '"ok": True, "not_shown": "no tool"')
    assert play(hidden, tmp_path, monkeypatch).trouble == "no evidence"
    outcome = play(f"{hidden}; {GREEN}", tmp_path, monkeypatch)
    assert not outcome.trouble
    assert gpu_run.counted(outcome.rows) == "1 of 2, 1 not shown"


def test_a_speed_that_misses_what_is_wanted_is_said_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a run that fails for a slow GPU, and a miss that only a reader of numbers finds."""
    facts = stage.wanted(0.5, least=0.7, form="{:.0%}")
    outcome = play(GREEN.replace('"ok": True', f'"ok": True, **{facts}'), tmp_path, monkeypatch)
    assert not outcome.trouble
    said = gpu_run.summary([outcome], Namespace(run="r", device="cpu", tiny=True, commit=""))
    assert "| one | 50% | ≥ 70%: missed |" in said


@pytest.mark.parametrize(("text", "numbers"), [("0-3", [0, 1, 2, 3]), ("2", [2]), ("3,1", [1, 3])])
def test_stages_are_chosen_by_number(text: str, numbers: list[int]) -> None:
    """Catches a range that leaves its end out."""
    assert [one.number for one in gpu_run.parse_stages(text)] == numbers


def test_a_later_run_keeps_what_an_earlier_one_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the second half of the stages that takes the place of the first in the summary."""
    monkeypatch.setattr(gpu_run, "run_all", lambda *_: [gpu_run.judge(STAGE, "", 1.0, [{"check": "a", "ok": True}])])
    monkeypatch.setattr(gpu_run.signal, "signal", lambda *_: None)
    for commit in ("first", "second"):
        monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--out", str(tmp_path), "--commit", commit])
        assert gpu_run.main() == 0
    said = (tmp_path / "summary.md").read_text()
    assert said.index("commit: second") < said.index("commit: first")


@pytest.mark.parametrize("text", ["", "0-99", "x", "3-1"])
def test_stages_that_are_not_there_are_refused(text: str) -> None:
    """Catches a run of nothing that ends well."""
    with pytest.raises(ArgumentTypeError, match="stages"):
        gpu_run.parse_stages(text)


def test_a_stage_sees_this_tree_and_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches kernels that are interpreted on the CPU and called a GPU's, and another trimkv that is installed."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    seen = gpu_run.environment()
    assert "TRITON_INTERPRET" not in seen
    assert seen["PYTHONPATH"].split(os.pathsep)[0] == str(Path(__file__).parents[2])


def test_the_runner_needs_nothing_but_python(tmp_path: Path) -> None:
    """Catches an import that a bare machine lacks."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", gpu_run.__file__, "--help"], capture_output=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def check_nothing(_: Setting) -> Iterator[Evidence]:
    yield from ()


def check_badly(_: Setting) -> Iterator[Evidence]:
    yield Evidence(check="first", ok=True)
    raise RuntimeError("an illegal memory access was encountered")


@pytest.mark.parametrize("check", [check_nothing, check_badly])
def test_a_check_that_breaks_or_shows_nothing_has_failed(check: stage.Check) -> None:
    """Catches a check that is passed over in silence."""
    file = io.StringIO()
    recorder = Recorder(file, {"run": "r", "stage": 1})
    stage.run_check(check, Setting(device=torch.device("cpu"), tiny=True, scratch=Path()), recorder)
    rows = [json.loads(line) for line in file.getvalue().splitlines()]
    assert recorder.failed
    assert (rows[-1]["ok"], rows[-1]["check"]) == (False, check.__name__)


def wrong_output(*arguments: Any, **settings: Any) -> torch.Tensor:
    return reference.decode(*arguments, **settings) * 1.01


def wrong_window(*arguments: Any, **settings: Any) -> torch.Tensor:
    return reference.decode(*arguments, **{**settings, "window": 5})


def no_eviction(*arguments: Any, **settings: Any) -> torch.Tensor:
    return reference.decode(*arguments, **settings, evict=False)


@pytest.mark.parametrize("decode", [wrong_output, wrong_window, no_eviction])
def test_operations_that_compute_wrongly_are_found(decode: Any) -> None:
    """Catches a comparison that cannot fail."""
    shape = next(smoke.shapes(Setting(device=torch.device("cpu"), tiny=True, scratch=Path())))
    right, wrong = (
        [evidence.ok for evidence in smoke.compare(Operations(chosen, reference.prefill), shape, torch.device("cpu"))]
        for chosen in (reference.decode, decode)
    )
    assert right == [True, True]
    assert wrong == [False, True]
