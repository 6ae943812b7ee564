"""The table of what a GPU is to show, from rows of `gpu_run.py`: what was measured beside what is wanted of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.gpu_run import wanted_line

ROWS = "gpu.jsonl"


def gpu_table(results: Path) -> str:
    """Return the last measurement of each row that something is wanted of; "" before anything has run on a GPU."""
    path = results / ROWS
    if not path.exists():
        return ""
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    name = next((row["name"] for row in reversed(rows) if row["check"] == "device"), "a GPU")
    last = {row["check"]: row for row in rows if "wanted" in row}
    return "\n".join([f"| {name} | measured | wanted |", "|---|---|---|", *map(wanted_line, last.values())])
