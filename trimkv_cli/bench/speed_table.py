"""The table of speed, from the records of `make bench-speed`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPEED_RECORDS = tuple(f"speed-10m-cpu{rest}.json" for rest in ("", "-8-rows", "-compiled", "-8-rows-compiled"))
OVERHEADS = "overheads-10m-cpu.json"


def speed_table(results: Path) -> str:
    """Return the table of the records that there are, in Markdown."""
    paths = [results / name for name in SPEED_RECORDS if (results / name).exists()]
    records: list[dict[str, Any]] = [json.loads(path.read_bytes()) for path in paths]
    overheads: dict[str, Any] = json.loads((results / OVERHEADS).read_bytes())
    first = records[0]
    budget = first["rows"][0]["kv_budget"]
    head = (
        f"| decode, 10 million random parameters, M = {budget}, {first['dtype']} on {first['threads']} CPU threads "
        "| trimkv | transformers | |"
    )
    lines = [line for record in records for line in _lines(record)]
    share, flat = overheads["eviction_share"], overheads["long_over_short"]
    lines.append(f"| scoring and eviction, of a decode step | {share:.1%} | | |")
    lines.append(f"| time per token after {overheads['long']:,} tokens, beside 1,024 | × {flat:.2f} | | |")
    return "\n".join([head, "|---|---|---|---|", *lines])


def _lines(record: dict[str, Any]) -> Iterator[str]:
    own = {(row["context"], row["rows"]): row for row in record["rows"] if row["engine"] == "trimkv"}
    full = {(row["context"], row["rows"]): row for row in record["rows"] if row["engine"] == "hf"}
    for case, row in own.items():
        other = full[case]
        context, rows = case
        how = ", `--compile`" if row["compiled"] else ""
        ratio = row["decode_tps"] / other["decode_tps"]
        many = "row" if rows == 1 else "rows"
        speeds = f"{row['decode_tps']:,.0f} tok/s | {other['decode_tps']:,.0f} tok/s"
        yield f"| after {context:,} tokens, {rows} {many}{how} | {speeds} | × {ratio:.1f} |"
