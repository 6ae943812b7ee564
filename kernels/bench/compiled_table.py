"""The table of what kernels take on GPUs, as compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SHOWN = (
    *(f"{kernel} bf16 {dim}" for kernel in ("scan", "merge") for dim in (64, 128, 256)),
    *(f"attend bf16 {dim} 512" for dim in (64, 128, 256)),
    "attend bf16 128 8",
)


def compiled_table(results: Path) -> str:
    """Return what the largest kernels take, and how many of all forms spill registers."""
    record: dict[str, Any] = json.loads((results / "compiled-kernels.json").read_bytes())
    rows: list[dict[str, Any]] = record["kernels"]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    found = {(row["kernel"], row["target"]): row for row in rows}
    head = f"compiled by triton {record['triton']}, not run: registers, KiB of shared memory"
    spilling = (_spilling([row for row in rows if row["target"] == target]) for target in targets)
    lines = [
        [head, *targets],
        ["---"] * (len(targets) + 1),
        *([name, *(_cell(found[name, target]) for target in targets)] for name in _SHOWN),
        ["forms of all kernels that spill registers", *spilling],
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['registers']}, {row['shared_bytes'] / 1024:.0f}"


def _spilling(rows: list[dict[str, Any]]) -> str:
    return f"{sum(row['spill_bytes'] > 0 for row in rows)} of {len(rows)}"
