"""The record of a measurement: a file of JSON that says where, with what and by which command."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimkv_cli.bench.speed import surroundings


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


def unpacked(commit: str, folder: Path) -> Path:
    """Unpack the tree of a commit, to be measured beside this one."""
    root = Path(__file__).parents[2]
    archive = subprocess.run(["git", "archive", commit], cwd=root, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return folder
