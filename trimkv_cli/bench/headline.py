"""The README's one table: the figure of each record that a reader asks for first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def headline(results: Path) -> str:
    """Return the table in Markdown, from the records in `results`."""

    def read(name: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((results / f"{name}.json").read_bytes())
        return record

    rows = [
        *_recall(read("recall-mini")["rows"]),
        ("`make mini`: its weights and gates, from nothing", f"{read('make-mini')['real_s'] / 60:.0f} minutes"),
        *_stream(read("stream-cpu")),
        *_speed(read("speed-10m-cpu")),
        *_batches(read("batching-mini"), read("kills-mini")),
    ]
    return "\n".join(
        ["| measured, on 2 CPU cores | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    )


def _recall(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    length = rows[0]["context"]
    told = {(row["policy"], row["kv_budget"]): f"{row['accuracy']:.0%}" for row in rows if row["context"] == length}
    budgets = sorted({size for policy, size in told if policy == "gates"})
    yield f"mini answers about facts told in {length:,} tokens: full cache", told["full", None]
    sizes = ", ".join(map(str, budgets))
    yield f"… gates, M = {sizes}", ", ".join(told["gates", size] for size in budgets)
    yield f"… streaming (sinks and recent tokens), M = {sizes}", ", ".join(told["streaming", size] for size in budgets)


def _stream(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    value = f"{record['kv_bytes_min']:,} and {record['kv_bytes_max']:,}"
    yield f"bytes of the cache, at the first and at the last of {record['steps']:,} tokens", value


def _speed(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    speeds = {(row["engine"], row["context"]): row["decode_tps"] for row in record["rows"] if row["rows"] == 1}
    contexts = sorted({context for _, context in speeds})
    ratios = (f"× {speeds['trimkv', context] / speeds['hf', context]:.1f}" for context in contexts)
    after = ", ".join(f"{context:,}" for context in contexts)
    name = f"decode beside transformers' growing cache, 10 million parameters, after {after} tokens"
    yield name, ", ".join(ratios)


def _batches(batching: dict[str, Any], kills: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "`run`: continuous batching over one prompt at a time", f"× {batching['continuous_over_one_at_a_time']:.1f}"
    name = f"`run`: a job of {kills['lines']} lines after kill -9 at {kills['kills']} random moments"
    yield name, f"{kills['answered']} answers once each, {kills['other_answers']} of them others"
