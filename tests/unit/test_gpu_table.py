"""The table of what a GPU is to show, from rows as `make bench-gpu` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_table import gpu_table


def speed(context: int, rows: int, kv_budget: int, tps: float, **rest: Any) -> dict[str, Any]:
    row = {"engine": "trimkv", "context": context, "rows": rows, "kv_budget": kv_budget, "decode_tps": tps}
    return {**row, "ms_per_token_p50": 1e3 * rows / tps, "peak_bytes": 9_000_000_000, "eviction": True, **rest}


def write(folder: Path, *runs: list[dict[str, Any]]) -> None:
    about = {"shape": "qwen3-4b", "dtype": "bf16", "device": "NVIDIA H200"}
    lines = [json.dumps({"rows": rows, **about}) for rows in runs]
    (folder / "gpu.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    kernel = {"op": "decode", "rows": 64, "slots": 4096, "copy_bandwidth": 4e12, "share_of_copy_bandwidth": 0.8}
    others = [{**kernel, "hardware": name} for name in ("NVIDIA H200", "x86_64")]
    (folder / "nvidia-h200.jsonl").write_text("\n".join(map(json.dumps, others)) + "\n", encoding="utf-8")


def test_each_row_stands_beside_what_is_wanted(tmp_path: Path) -> None:
    """Catches a ratio of the wrong rows: a full cache, another number of rows, a step without eviction."""
    write(
        tmp_path,
        [speed(32_768, 4, 1024, 100.0), speed(16_384, 4, 1024, 1661.0)],
        [speed(32_768, 4, 1024, 1560.0), speed(16_384, 8, 1024, 2800.0)],
        [speed(2048, 1, 4096, 250.0), {**speed(2048, 1, 4096, 20.0), "engine": "hf", "kv_budget": None}],
        [speed(131_072, 1, 4096, 250.0, peak_bytes=9_009_000_000)],
        [speed(2048, 1, 4096, 252.0, eviction=False)],
    )
    lines = gpu_table(tmp_path).splitlines()
    assert "NVIDIA H200" in lines[0]
    assert [line.split("|")[2].strip() for line in lines[2:5]] == [
        "1,560 tok/s, × 12.0",
        "1,661 tok/s, × 11.0",
        "2,800 tok/s, × 10.0",
    ]
    read, evicted, flat, kernel = (line.split("|")[2].strip() for line in lines[5:])
    assert read == "55%"  # 8.0 GB of weights, 0.1 of gates and 0.6 of slots at 4 TB/s are 2.2 ms of 4
    assert (evicted, flat, kernel) == ("0.8%", "× 1.0010", "80%")


def test_what_was_not_measured_is_not_there(tmp_path: Path) -> None:
    """Catches a table, or a line of one, without a measurement."""
    assert gpu_table(tmp_path) == ""
    write(tmp_path, [speed(16_384, 4, 1024, 1510.0)])
    lines = gpu_table(tmp_path).splitlines()
    assert len(lines) == 4
    assert "× 10.0" in lines[2]


@pytest.mark.parametrize("name", ["gpu.jsonl"])
def test_make_writes_where_the_table_reads(name: str) -> None:
    """Catches a target whose rows no table shows."""
    assert f"/{name}" in (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
