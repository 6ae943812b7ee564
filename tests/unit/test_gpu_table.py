"""The table of what a GPU is to show, from rows as `gpu_run.py` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.gpu_stages.stage import wanted
from bench.gpu_table import gpu_table


def write(folder: Path, *rows: dict[str, Any]) -> None:
    path = folder / "gpu.jsonl"
    path.write_text("".join(json.dumps({"run": "r", "ok": True, **row}) + "\n" for row in rows), encoding="utf-8")


def test_each_row_stands_beside_what_is_wanted(tmp_path: Path) -> None:
    """Catches an older measurement of a row, rows that nothing is wanted of, and what is missed and not said."""
    assert gpu_table(tmp_path) == ""
    write(
        tmp_path,
        {"check": "device", "name": "NVIDIA H200"},
        {"check": "decode", **wanted(0.69, least=0.7, form="{:.0%}")},
        {"check": "sampler"},
        {"check": "decode", **wanted(0.7, least=0.7, form="{:.0%}")},
        {"check": "eviction", **wanted(0.012, most=0.01, form="{:.1%}")},
    )
    assert gpu_table(tmp_path).splitlines() == [
        "| NVIDIA H200 | measured | wanted |",
        "|---|---|---|",
        "| decode | 70% | ≥ 70% |",
        "| eviction | 1.2% | ≤ 1.0%: missed |",
    ]


def test_make_writes_where_the_table_reads() -> None:
    """Catches a target whose rows no table shows."""
    assert "/gpu.jsonl" in (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
