"""Where, with what and by which command something was measured, and the file that keeps it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers


def write_record(module: str, measured: dict[str, Any], out: Path | None) -> None:
    """Write one JSON object to `out`, or print it."""
    text = json.dumps({**surroundings(module), **measured}, indent=2)
    if out is None:
        print(text)
    else:
        out.write_text(text + "\n", encoding="utf-8")


def run_trimkv(arguments: Sequence[str]) -> dict[str, Any]:
    """Run trimkv in a process of its own and return the JSON object that it prints."""
    done = subprocess.run([sys.executable, "-m", "trimkv_cli", *arguments], capture_output=True, check=True)
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def surroundings(module: str) -> dict[str, Any]:
    """Say with what `module` measures here and now."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
