"""Mistakes that only a compiler for a GPU sees: what does not compile, spills registers or wants too much memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no wheel for this platform")


@pytest.mark.slow
def test_every_kernel_compiles_without_spills_and_loads_ahead() -> None:
    """Catches a kernel that the interpreter runs and a GPU does not, or only slowly: it waits for each load, say."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "bench.compiled", "--few"],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {"scan", "merge", "attend", "move", "add_norm", "rotate", "activate", "evict", "rank", "undo", "clear"}
    assert {row["kernel"].split()[0] for row in rows} == kernels
    assert {row["target"] for row in rows} == {"sm_80", "sm_89", "sm_90", "sm_120", "gfx942"}
    assert [row for row in rows if row["spill_bytes"] or row["shared_bytes"] > row["shared_limit"]] == []
    loops = [row for row in rows if row["target"] != "gfx942" and row["kernel"].startswith(("scan", "attend"))]
    assert [row for row in loops if row["buffers"] < 2] == []
    assert {
        row["products"] for row in rows if row["kernel"].startswith("attend bf16") and row["target"] == "sm_90"
    } == {"wgmma"}
