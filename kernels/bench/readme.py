"""Write the tables of what was measured from the recorded results, so that no number in them is typed.

The README has the headlines, `kernels/bench/results/README.md` has all: python -m bench.readme
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.compiled_table import compiled_table
from bench.gpu_table import gpu_table
from bench.llama_table import llama_tables
from bench.recall_table import kvpress_table, recall_tables, training_table
from bench.tables import batch_table, headline, mini_plot, mini_tables, speed_table

_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "kernels" / "bench" / "results"
_BLOCK = re.compile(r"(<!-- measured: [^\n]* -->\n).*?(<!-- /measured -->)", re.DOTALL)


def table() -> str:
    """Return the README's table, in Markdown."""
    return headline(_RESULTS)


def all_tables() -> str:
    """Return all tables in Markdown."""
    own = [_engine_table(), _display_table()]
    tables = [
        recall_tables(_RESULTS),
        kvpress_table(_RESULTS),
        training_table(_RESULTS),
        llama_tables(_RESULTS),
        mini_tables(_RESULTS),
        mini_plot(_RESULTS),
        speed_table(_RESULTS),
        gpu_table(_RESULTS),
        compiled_table(_RESULTS),
        *own,
        batch_table(_RESULTS),
    ]
    return "\n\n".join(made for made in tables if made)


def _engine_table() -> str:
    stream: dict[str, Any] = json.loads((_RESULTS / "stream-cpu.json").read_bytes())
    flips: dict[str, Any] = json.loads((_RESULTS / "flips-cpu.json").read_bytes())
    rows = [
        ("", f"{stream['steps']:,} tokens through a tiny random model, M = {stream['kv_budget']}, CPU"),
        ("bytes of the cache", f"{stream['kv_bytes_min']:,} at the start, {stream['kv_bytes_max']:,} at the end"),
        ("growth of the process after warm-up", f"{stream['rss_bytes_growth'] / 2**20:.1f} MiB"),
        ("time per token, first tenth and last tenth (medians)", _times(stream)),
        *((_flip_name(row, flips), f"{row['flips']} of {row['requests']:,}") for row in flips["rows"]),
    ]
    head, *body = (f"| {name} | {value} |" for name, value in rows)
    return "\n".join([head, "|---|---|", *body])


def _display_table() -> str:
    text: dict[str, Any] = json.loads((_RESULTS / "long-text-cpu.json").read_bytes())
    panel: dict[str, Any] = json.loads((_RESULTS / "panel-cpu.json").read_bytes())
    rows = [(f"growth of the process after the first half, {_way(row)}", _mib(row)) for row in text["rows"]]
    rows.append(
        ("time for one redraw of the live panel, of which there is one a second", f"{panel['redraw_ms']:.1f} ms")
    )
    head = f"`summarize` of {text['rows'][0]['prompt_tokens']:,} tokens by mini, M = {text['kv_budget']}, CPU"
    return "\n".join([f"|  | {head} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _way(row: dict[str, Any]) -> str:
    parts = "" if row["parts"] == 1 else f", {row['parts']} parts"
    return f"`--on-overflow {row['overflow']}`{parts}"


def _mib(row: dict[str, Any]) -> str:
    growth, cache = row["rss_bytes_growth_after_half"] / 2**20, row["kv_bytes"]
    return f"{growth:.1f} MiB; the cache has {cache:,} bytes"


def _times(stream: dict[str, Any]) -> str:
    first, last = stream["ms_per_token_first_tenth_p50"], stream["ms_per_token_last_tenth_p50"]
    return f"{first:.2f} ms and {last:.2f} ms (× {stream['last_over_first']:.2f})"


def _flip_name(row: dict[str, Any], flips: dict[str, Any]) -> str:
    how = "greedy" if row["greedy"] else "sampled"
    mode = ", `--deterministic`" if row["deterministic"] else ""
    return f"requests whose tokens differ alone and among 8 ({how}, M = {flips['kv_budget']}{mode})"


def fill(readme: str, tables: str) -> str:
    """Return a page with fresh tables."""
    return _BLOCK.sub(lambda block: f"{block[1]}{tables}\n{block[2]}", readme)


def pages() -> dict[Path, str]:
    """Return the pages that hold tables, as they should read."""
    tables = {_ROOT / "README.md": table(), _RESULTS / "README.md": all_tables()}
    return {path: fill(path.read_text(encoding="utf-8"), made) for path, made in tables.items()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
