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
def test_every_kernel_compiles_for_sm_80_and_sm_90_without_spills() -> None:
    """Catches a kernel that the interpreter runs and a GPU does not, or only slowly."""
    script = Path(__file__).parents[1] / "helpers" / "compile_kernels.py"
    kernels = Path(__file__).parents[2] / "kernels"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script],
        env={**environment, "PYTHONPATH": str(kernels), "TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"].split()[0] for row in rows} == {
        "scan",
        "merge",
        "attend",
        "move",
        "add_norm",
        "rotate",
        "activate",
        "evict",
        "undo",
        "clear",
    }
    assert {row["sm"] for row in rows} == {80, 89, 90}
    assert [row for row in rows if row["spill_bytes"] or row["shared_bytes"] > row["shared_limit"]] == []
