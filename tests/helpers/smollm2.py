"""The real SmolLM2-135M-Instruct, in build/; tests skip where it cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.programs import ENVIRONMENT, ROOT

NAME = "smollm2-135m-instruct"
HOME = {"XDG_DATA_HOME": str(ROOT / "build" / "data")}


def smollm2_file() -> Path:
    """Return the GGUF file; where CI says so, its absence is a failure."""
    pulled = subprocess.run(
        [sys.executable, "-m", "trimkv_cli", "models", "pull", NAME],
        env={**ENVIRONMENT, **HOME},
        capture_output=True,
        text=True,
        check=False,
    )
    if pulled.returncode == 0:
        return Path(pulled.stdout.strip())
    if "CI" in os.environ:
        pytest.fail(f"SmolLM2 cannot be had: {pulled.stderr}")
    pytest.skip(f"SmolLM2 cannot be had: {pulled.stderr.splitlines()[-2]}")
