"""`trimkv doctor` as a process: what it prints where, and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.programs import Run
from trimkv_cli.loading.checkup import measure_machine

ROOT = Path(__file__).parents[2]


def _doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "trimkv_cli", "doctor", *arguments]
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_json_is_all_of_stdout(here: Run) -> None:
    """Catch progress bars or remarks between a program and the object it reads."""
    done = here("doctor", "--json")
    report = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == 0)
    assert {"name", "status", "detail", "hint"} == report["checks"][0].keys()
    assert "mini gates" in {check["name"] for check in report["checks"]}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="folders are named by other variables there")
def test_fault_is_exit_1_with_a_hint(tmp_path: Path) -> None:
    """Catch a doctor that finds a fault and says that all is well."""
    (tmp_path / "file").touch()
    done = _doctor(HF_HUB_CACHE=str(tmp_path / "file" / "hub"))
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    (fault,) = [number for number, line in enumerate(lines) if line.startswith("fault")]
    assert "model cache folder" in lines[fault]
    assert lines[fault + 1].startswith("hint: ")


@pytest.mark.slow
def test_measuring_needs_no_module_that_some_systems_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catch a calibration that always fails on Windows, which has no `resource`, or without the optional NVML."""
    hidden = "import psutil, sys; sys.modules.update(resource=None, pynvml=None)"  # psutil itself knows its system
    (tmp_path / "sitecustomize.py").write_text(hidden)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")]))
    measured = measure_machine().cpu_runtime_bytes
    assert measured is not None
    assert measured > 2**26
