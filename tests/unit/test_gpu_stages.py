"""The stages of `gpu_run.py`: that a broken bound, a missing graph or a test that did not run is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases import Case
from bench.gpu_stages import kernels, speed, suite, tools
from bench.gpu_stages.stage import Setting
from trimkv_cli.bench.shapes import Network
from trimkv_cli.bench.speed import SpeedRow
from trimkv_kernels.launch import MOST_SPLITS, UNKNOWN, decode_launch

GPU = Setting(device=torch.device("cuda", 0), tiny=True, scratch=Path())
CPU = replace(GPU, device=torch.device("cpu"))
ROW = SpeedRow(
    engine="trimkv", context=16, rows=1, kv_budget=8, keeps_all=False, prefill_tps=1.0, decode_tps=1.0, steps=64,
    ms_per_token_p50=1.0, ms_per_token_p95=1.0, ttft_s=1.0, predicted_bytes=1, peak_bytes=1, eviction=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def network() -> Network:
    return speed.network.__wrapped__(CPU)


@pytest.mark.parametrize(
    ("changes", "ok"), [({}, True), ({"peak_bytes": 1 << 40}, False), ({"no_graph": "x"}, False), ({"steps": 0}, False)]
)
def test_a_measurement_beyond_its_bound_or_without_a_graph_has_failed(
    changes: dict[str, Any], ok: bool, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a speed that is kept although it was measured of something else, or in more memory than planned."""
    monkeypatch.setattr(speed, "network", lambda _: network)
    monkeypatch.setattr(speed, "bandwidth", lambda _: 1e12)
    monkeypatch.setattr(speed, "measure", lambda *_: [replace(ROW, **changes)])
    found = list(speed.speeds(GPU, speed.ONE_ROW[1]))
    assert [one.check.split()[0] for one in found] == ["decode", "prefill"]
    assert [one.ok for one in found] == [ok, ok]
    assert found[0].facts["met"] is False


@pytest.mark.parametrize("size", [1, 63, 64, 1000, 4096])
@pytest.mark.parametrize("change", [{"block": 32}, {"block": 128}, {"splits": 0.5}, {"splits": 4}])
def test_other_launches_cover_all_slots(size: int, change: dict[str, Any]) -> None:
    """Catches a variant that is fast because it reads less."""
    own = decode_launch(programs=8, size=size, head_dim=128, element_size=2, chip=UNKNOWN)
    made = kernels.resized(own, size, **change)
    assert made.splits <= MOST_SPLITS
    assert (made.splits - 1) * made.split_slots < size <= made.splits * made.split_slots
    assert made.split_slots % made.block == 0


def test_sets_of_slots_take_turns_until_no_cache_holds_them() -> None:
    """Catches a time of slots that lie in the cache, and more sets than a GPU has memory for."""
    heads: dict[str, Any] = {"num_kv_heads": 8, "groups": 4, "head_dim": 128, "dtype": "bf16", "tokens": 1}
    whole = replace(GPU, tiny=False)
    for rows, slots in ((1, 512), (64, 16_384)):
        case = Case(op="decode", rows=rows, slots=slots, **heads)
        count = kernels.sets_of(case, whole)
        assert 2**27 <= count * case.bytes_moved <= 10 * 2**30


def report(folder: Path, *cases: str) -> Path:
    path = folder / "report.xml"
    path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>", encoding="utf-8")
    return path


PASSED, FAILED, SKIPPED = (
    f'<testcase name="t">{inside}</testcase>' for inside in ("", "<failure/>", '<skipped type="pytest.skip"/>')
)


@pytest.mark.parametrize(
    ("cases", "code", "ok"),
    [([PASSED], 0, True), ([], 0, False), ([SKIPPED], 0, False), ([PASSED, SKIPPED], 0, False), ([PASSED], 1, False),
     ([PASSED, FAILED], 0, False)],
)  # fmt: skip
def test_tests_pass_on_a_gpu_when_all_have_run(cases: list[str], code: int, ok: bool, tmp_path: Path) -> None:
    """Catches tests that were skipped, or not collected, and count as green."""
    assert suite.judge("file", code, report(tmp_path, *cases), GPU).ok is ok


def test_pytest_that_dies_has_failed(tmp_path: Path) -> None:
    """Catches an import error of conftest.py that leaves no report."""
    assert not suite.judge("file", 4, tmp_path / "none.xml", GPU).ok


def test_counters_are_read_from_where_ncus_talk_ends() -> None:
    """Catches the line of units taken for a kernel, and talk taken for a table."""
    said = '==PROF== Connected\n"ID","Kernel Name","gpu__time_duration.sum"\n"","","ns"\n"0","_scan","12,345"\n'
    assert tools.parse_counters(said) == [("_scan", {"time": "12,345"})]
    assert tools.parse_counters("==ERROR== ERR_NVGPUCTRPERM") == []


@pytest.mark.parametrize(
    ("program", "ok", "code"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'", True, 0),
        ("echo '========= ERROR SUMMARY: 1 error'; exit 99", False, 99),
        ("exec sleep 60", False, None),
    ],
)
def test_a_sanitizer_that_finds_something_or_hangs_is_no_pass(
    program: str, ok: bool, code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a finding that is taken for talk, and a tool that takes the other stages' time."""
    path = tmp_path / "compute-sanitizer"
    path.write_text(f"#!/bin/sh\n{program}\n", encoding="utf-8")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(tools, "_TOOL_S", 0.5)
    found = list(tools.sanitizers(replace(GPU, scratch=tmp_path)))
    assert [(one.check, one.ok, one.facts["exit_code"]) for one in found] == [
        ("memcheck", ok, code),
        ("racecheck", ok, code),
    ]


def test_tools_that_are_not_installed_are_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stage that is green for what nobody has looked at."""
    monkeypatch.setattr(tools, "find", lambda _: None)
    found = [*tools.sanitizers(GPU), *tools.counters(GPU)]
    assert [one.check for one in found] == ["memcheck", "racecheck", "ncu"]
    assert all("not_shown" in one.facts for one in found)
