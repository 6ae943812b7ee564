"""The table of what a GPU is to show, from the rows of `make bench-gpu`: each measured, and what is wanted of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from trimkv_cli.bench.shapes import find_shape
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.plan.plan import make_plan

ROWS = "gpu.jsonl"
_PAPER_TPS = {(32_768, 4): 130, (16_384, 4): 151, (16_384, 8): 280}  # arXiv 2512.03324: H100 or H200, M = 1,024
_TIMES_PAPER = 10

Row = Mapping[str, Any]


def gpu_table(results: Path) -> str:
    """Return the table of the rows that there are, in Markdown; "" before anything has run on a GPU."""
    path = results / ROWS
    if not path.exists():
        return ""
    records: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    last = records[-1]
    speeds = [row for record in records if record["device"] == last["device"] for row in record["rows"]]
    own = [row for row in speeds if row["engine"] == "trimkv"]
    kernels = [row for row in _kernels(results) if row["hardware"] == last["device"]]
    lines = list(chain(_beside_paper(own), _one_row(own, kernels, last), _eviction(own), _flat(own), _kernel(kernels)))
    head = f"| {last['shape']}, random weights, {last['dtype']} on {last['device']} | measured | wanted |"
    return "\n".join([head, "|---|---|---|", *lines])


def _kernels(results: Path) -> Iterator[Row]:
    for path in sorted(results.glob("*.jsonl")):
        if path.name != ROWS:
            yield from (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def _beside_paper(own: Iterable[Row]) -> Iterator[str]:
    for (context, rows), paper in _PAPER_TPS.items():
        row = _last(own, lambda row, c=context, r=rows: (row["context"], row["rows"]) == (c, r))  # type: ignore[misc]
        if row is not None:
            after = f"after {context:,} tokens, {rows} rows, M = {row['kv_budget']}"
            speed = f"{row['decode_tps']:,.0f} tok/s, × {row['decode_tps'] / paper:.1f}"
            yield f"| decode {after}, beside the paper's {paper} tok/s | {speed} | ≥ × {_TIMES_PAPER} |"


def _one_row(own: Iterable[Row], kernels: Iterable[Row], record: Row) -> Iterator[str]:
    """Compare a step of one row with a copy of the bytes that it must read."""
    row = _last(own, lambda row: row["rows"] == 1 and row["eviction"])
    bandwidth = max((kernel["copy_bandwidth"] for kernel in kernels), default=None)
    if row is None or bandwidth is None:
        return
    shape = find_shape(record["shape"])
    options = PlanOptions(kv_budget=row["kv_budget"], max_inflight=1, dtype=record["dtype"])
    plan = make_plan(shape.spec, shape.gate, options)
    read = sum(plan.run.part_bytes(part) for part in ("weights", "gates", "kv"))
    share = read / bandwidth / (row["ms_per_token_p50"] / 1e3)
    what = f"speed of one row, M = {row['kv_budget']}, of what reading its bytes at copy bandwidth allows"
    yield f"| {what} | {share:.0%} | ≥ 70% |"


def _eviction(own: Iterable[Row]) -> Iterator[str]:
    off = _last(own, lambda row: not row["eviction"])
    same = ("context", "rows", "kv_budget")
    on = off and _last(own, lambda row: row["eviction"] and all(row[key] == off[key] for key in same))
    if off and on:
        yield f"| scoring and eviction, of a step | {1 - off['ms_per_token_p50'] / on['ms_per_token_p50']:.1%} | ≤ 1% |"


def _flat(own: Iterable[Row]) -> Iterator[str]:
    ones = [row for row in own if row["rows"] == 1 and row["eviction"] and row["peak_bytes"]]
    if ones:
        short, long = (choose(ones, key=lambda row: int(row["context"])) for choose in (min, max))
        name = f"peak memory after {long['context']:,} tokens, beside {short['context']:,}"
        yield f"| {name} | × {long['peak_bytes'] / short['peak_bytes']:.4f} | ≤ × 1.01 |"


def _kernel(kernels: Iterable[Row]) -> Iterator[str]:
    row = _last(kernels, lambda row: (row["op"], row["rows"], row["slots"]) == ("decode", 64, 4096))
    if row is not None:
        yield f"| decode kernel, 64 rows, M = 4,096, of copy bandwidth | {row['share_of_copy_bandwidth']:.0%} | ≥ 75% |"


def _last(rows: Iterable[Row], fits: Callable[[Row], bool]) -> Row | None:
    return next((row for row in reversed(list(rows)) if fits(row)), None)
