"""The table of what was measured of `trimkv run`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def batch_table(results: Path) -> str:
    """Return the table in Markdown, from the records in `results`."""

    def read(name: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((results / f"{name}.json").read_bytes())
        return record

    batching = read("batching-mini")
    rows = [
        *_speed(batching),
        *_prefix(read("shared-prefix-mini")),
        *_kills(read("kills-mini")),
        *_scan(read("scan")),
        *_flips(read("flips-ray")),
    ]
    head = f"| `trimkv run` with mini, {batching['rows']} rows, {batching['threads']} CPU thread | |"
    return "\n".join([head, "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _speed(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    speeds = record["tokens_per_cpu_s"]
    what = f"{record['prompts']} prompts, answers of 1 to {record['longest']} tokens"
    yield f"{what}: continuous batching", f"{speeds['continuous']:,.0f} tokens per CPU second"
    one, static = record["continuous_over_one_at_a_time"], record["continuous_over_static"]
    yield "… over one prompt at a time, and over static batches of as many rows", f"× {one:.1f} and × {static:.2f}"


def _prefix(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    shared, apart = record["shared"], record["apart"]
    name = f"a system prompt of {record['prefix_tokens']:,} tokens over {record['lines']} lines is read"
    times = record["times_the_prefix_was_read"]
    yield (
        name,
        f"{times} time{'' if times == 1 else 's'}: {shared['tokens_read']:,} of {shared['prompt_tokens']:,} tokens",
    )
    yield (
        "… time to the first token (median), shared and read each time",
        (f"{shared['ttft_ms_p50']:,.0f} ms and {apart['ttft_ms_p50']:,.0f} ms"),
    )


def _kills(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    found = f"{record['answered']} ids once each, {record['other_answers']} other answers"
    yield f"a job of {record['lines']} lines after kill -9 at {record['kills']} random moments", found


def _scan(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    few, many = sorted((key for key in record["resume"] if key.isdigit()), key=int)
    rate, growth = record["resume"][many]["lines_per_s"], record["resume"]["rss_growth_bytes"] / 2**20
    name = f"reading an output and an input of {int(many):,} lines to resume"
    yield name, f"{rate:,.0f} lines/s, {growth:.0f} MiB more than for {int(few):,}"


def _flips(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for row in record["rows"]:
        how = ("greedy" if row["greedy"] else "sampled") + (", `--deterministic`" if row["deterministic"] else "")
        yield (
            f"lines whose tokens differ between one process and {record['workers']} Ray workers ({how})",
            (f"{row['flips']} of {row['lines']:,}"),
        )
