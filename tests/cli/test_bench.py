"""Catches a measurement that is incomplete, or an option that is silently without effect."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import trimkv_cli
from helpers.programs import Run
from trimkv_cli.bench.shapes import find_shape
from trimkv_cli.bench.speed import own_commit, surroundings
from trimkv_cli.commands.bench import BenchOptions, bench
from trimkv_cli.errors import ContextOverflow, UsageError
from trimkv_cli.loading.options import EngineOptions


def test_both_sides_are_measured_and_predicted_bytes_come_first(here: Run) -> None:
    done = here(
        "bench", "--kv-budget", "16,32", "--contexts", "40", "--compare", "hf", "--threads", "1", "--json", "--offline"
    )
    assert done.returncode == 0, done.stderr
    assert b"predicted for M = 16, 1 rows, context 40" in done.stderr
    result = json.loads(done.stdout)
    rows = result["rows"]
    assert [(row["engine"], row["kv_budget"]) for row in rows] == [("trimkv", 16), ("hf", None), ("trimkv", 32)]
    for row in rows:
        assert (row["context"], row["rows"], row["steps"]) == (40, 1, 64)
        assert row["decode_tps"] == pytest.approx(1000 * row["rows"] / row["ms_per_token_p50"])
        assert 0 < row["ms_per_token_p50"] <= row["ms_per_token_p95"]
        assert row["prefill_tps"] > 0 < row["ttft_s"]
        assert row["predicted_bytes"] > 0 < row["peak_bytes"]
    assert {"command", "commit", "torch", "device", "dtype"} <= result.keys()


def test_a_result_is_kept_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a measurement that is lost in the end because `git` is not installed."""
    monkeypatch.setenv("PATH", "")
    assert surroundings("trimkv_cli")["commit"] == f"version {trimkv_cli.__version__}"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_code_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the commit of the folder one happens to be in, or of the project whose environment trimkv lies in."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    package = tmp_path / ".venv" / "trimkv_cli"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "another project")
    monkeypatch.chdir(tmp_path)
    assert own_commit() != git("rev-parse", "HEAD")
    assert own_commit(package) == f"version {trimkv_cli.__version__}"
    git("add", "-f", ".venv")
    git("commit", "-q", "-m", "now its own")
    assert own_commit(package) == git("rev-parse", "HEAD")


def test_shapes_are_found_by_profile_and_size() -> None:
    assert find_shape("qwen3-4b").spec.num_layers == find_shape("qwen3-4b-math").spec.num_layers == 36
    assert 9e6 < find_shape("10m").spec.weight_numel < 11e6
    with pytest.raises(UsageError, match="no shape 'huge'"):
        find_shape("huge")


def refused(**chosen: Any) -> None:
    bench(chosen=BenchOptions(**chosen), engine=EngineOptions(device="cpu"), json=False, quiet=False)


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(UsageError, match="no weights of its own"):
        refused(shape="10m")
    with pytest.raises(UsageError, match="needs a --shape"):
        refused(random_weights=True)
    with pytest.raises(UsageError, match="not held as nf4"):
        bench(
            chosen=BenchOptions(shape="10m", random_weights=True),
            engine=EngineOptions(device="cpu", quantize="nf4"),
            json=False,
            quiet=False,
        )
    with pytest.raises(UsageError, match="--contexts"):
        refused(shape="10m", random_weights=True, contexts="1k")
    with pytest.raises(ContextOverflow, match="131072"):
        refused(shape="10m", random_weights=True, contexts="131072")
