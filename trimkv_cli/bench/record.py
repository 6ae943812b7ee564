"""Where, with what and by which command something was measured, and the file that keeps it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import trimkv_cli


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
    return {
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "commit": own_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def own_commit(folder: Path | None = None) -> str:
    """Name the commit of trimkv's own code, which lies in `folder`; "version X" where that is in no repository.

    It may lie inside another project's repository, in its virtual environment: then git does not know its files.
    """
    folder = folder or Path(__file__).parents[1]
    known = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    commit = None if known is None else _git(folder, "rev-parse", "HEAD")
    return commit or f"version {trimkv_cli.__version__}"


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints about a folder; None when it fails or is not there."""
    around = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, env=around, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
