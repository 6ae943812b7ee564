"""Tables and the picture of what a real model remembers: accuracy against the bytes of its cache.

python -m bench.recall_table draws the picture anew; the tables are written by `bench.readme`. Needs the extra `plot`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "kernels" / "bench" / "results"
_PICTURE = _ROOT / "examples" / "recall.svg"
_NAMES = {
    "full": "full cache",
    "gates": "trained gates",
    "keydiff": "KeyDiff",
    "streaming": "streaming",
    "protected": "streaming, `prompt:10%` pinned",
    "random": "random",
}
_TITLES = {
    "needle": "facts in {context:,} tokens of text, one prompt",
    "whole chunk": "the same, read in chunks of {prefill_chunk}",
    "multi-turn": "facts told over a chat of {context:,} tokens",
    "longer": "facts in {context:,} tokens of text",
    "longest": "facts in {context:,} tokens of text",
    "prose": "perplexity of {context:,} tokens",
    "prose pinned": "the same, `recent:96` pinned",
    "rules": "rules of a system message kept, {context:,} tokens later",
    "rules pinned": "the same, system message pinned",
    "ends pinned": "facts in {context:,} tokens of text, `prompt:10%` pinned",
}
_Row = dict[str, Any]


def recall_rows(results: Path) -> Iterator[tuple[str, str]]:
    """Yield the README's lines, name and value, once they were measured."""
    rows = [row for row in _rows(results / "recall-smollm2.json") if row["table"] == "needle"]
    if not rows:
        return
    full = next(row for row in rows if row["policy"] == "full")
    budgets = sorted({row["kv_budget"] for row in rows if row["kv_budget"]})
    yield (
        f"SmolLM2-135M: facts hidden in {full['context']} tokens of unseen text, asked for in other words, full cache",
        f"{full['accuracy']:.0%}",
    )
    for policy in ("gates", "protected", "streaming", "keydiff"):
        found = {row["kv_budget"]: row["accuracy"] for row in rows if row["policy"] == policy}
        if found:
            sizes = ", ".join(map(str, budgets))
            yield f"… {_NAMES[policy]}, M = {sizes}", ", ".join(f"{found[size]:.0%}" for size in budgets)


def recall_tables(results: Path) -> str:
    """Return a table for each model that was asked, in Markdown."""
    paths = sorted(path for path in results.glob("recall-*.json") if path.stem != "recall-mini")
    return "\n\n".join(_table(json.loads(path.read_bytes())) for path in paths)


def kvpress_table(results: Path) -> str:
    """Return what kvpress's presses and our scorers remember of the same questions, in as many bytes; "" before."""
    paths = [results / f"{name}-smollm2.json" for name in ("kvpress", "beside-kvpress")]
    if not all(path.is_file() for path in paths):
        return ""
    rows: list[_Row] = [row for path in paths for row in json.loads(path.read_bytes())["rows"]]
    full = next(row for row in rows if row["policy"] == "kvpress-full")
    sizes = sorted({row["kv_budget"] for row in rows if row["kv_budget"]})
    lines = [
        f"| SmolLM2, {full['n']} questions, full cache {full['accuracy']:.0%} | "
        + " | ".join(f"{size} tokens per head" for size in sizes)
        + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for policy in dict.fromkeys(row["policy"] for row in rows if row["kv_budget"]):
        found = {row["kv_budget"]: row for row in rows if row["policy"] == policy}
        theirs = policy.startswith("kvpress-")
        name = f"kvpress: {policy.removeprefix('kvpress-')}" if theirs else f"trimkv: {_NAMES[policy]}"
        cells = (f"{found[size]['accuracy']:.0%} ({_interval(found[size])})" if size in found else "" for size in sizes)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def training_table(results: Path) -> str:
    """Return how fast gates are trained, beside an earlier commit."""
    record = json.loads((results / "train-speed-smollm2.json").read_bytes())
    speeds, threads = record["median"], record["threads"]
    rows = [
        f"| `gates train` of SmolLM2, evicting, `--context 1536`, {threads} CPU thread | {speeds['now']} tok/s |",
        f"| … before ({record['beside']}), in turns | {speeds['before']} tok/s |",
        f"| … the first steps, which learn from attention alone | {speeds['now, attention steps']} tok/s |",
    ]
    return "\n".join(["|  | |", "|---|---|", *rows])


def _interval(row: _Row) -> str:
    return "–".join(f"{end:.0%}" for end in row["ci95"] or ())


def _table(record: dict[str, Any]) -> str:
    lines = [
        f"| {record['model']} | cache | score | 95 % interval | of the full one's | questions | tokens of an answer |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = {row["table"]: row for row in record["rows"] if row["policy"] == "full"}
    lines += [_line(row, whole.get(row["table"].removesuffix(" pinned"), whole["needle"])) for row in record["rows"]]
    return "\n".join(lines)


def _line(row: _Row, full: _Row) -> str:
    what = _TITLES[row["table"]].format(**row)
    budget = "" if row["kv_budget"] is None else f", M = {row['kv_budget']}"
    policy = f"{_NAMES[row['policy']]}{budget}"
    size = f"{row['kv_bytes'] / 2**20:.1f} MiB"
    if row["nats"] is not None:
        ratio = "" if row["policy"] == "full" else f"× {math.exp(row['nats'] - full['nats']):.3f}"
        ends = [f"{math.exp(end):.2f}" for end in row["ci95"] or ()]
        score = f"{math.exp(row['nats']):.2f}"
    else:
        ratio = f"{row['accuracy'] / full['accuracy']:.0%}" if full["accuracy"] and row is not full else ""
        ends = [_interval(row)]
        score = f"{row['accuracy']:.1%}"
    said = "" if row["answer_tokens"] is None else f"{row['answer_tokens']:.0f}"
    return f"| {what}: {policy} | {size} | {score} | {'–'.join(ends)} | {ratio} | {row['n']} | {said} |"


def _rows(path: Path) -> Sequence[_Row]:
    if not path.is_file():
        return []
    rows: list[_Row] = json.loads(path.read_bytes())["rows"]
    return rows


def draw(results: Path, picture: Path) -> None:
    """Draw accuracy against the bytes of the cache: a line for each policy, the full cache as a level."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "trimkv"
    rows = [row for row in _rows(results / "recall-smollm2.json") if row["table"] == "needle"]
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    (full,) = (row for row in rows if row["policy"] == "full")
    axes.axhline(100 * full["accuracy"], color="black", linewidth=1, linestyle="--")
    axes.annotate("full cache", (0.01, 100 * full["accuracy"] + 1), xycoords=("axes fraction", "data"), fontsize=8)
    for policy in dict.fromkeys(row["policy"] for row in rows if row["policy"] != "full"):
        found = sorted((row for row in rows if row["policy"] == policy), key=lambda row: int(row["kv_budget"]))
        sizes, scores = [row["kv_bytes"] / 2**20 for row in found], [100 * row["accuracy"] for row in found]
        low, high = zip(*((100 * row["ci95"][0], 100 * row["ci95"][1]) for row in found), strict=True)
        width = 2.5 if policy == "gates" else 1.2
        (line,) = axes.plot(
            sizes, scores, marker="o", markersize=4, linewidth=width, label=_NAMES[policy].replace("`", "")
        )
        axes.fill_between(sizes, low, high, alpha=0.12, color=line.get_color())
    axes.set(xlabel="MiB of cache for a sequence, whatever its length", ylabel="right answers, %", ylim=(0, None))
    axes.set_title(f"SmolLM2-135M-Instruct: facts in {full['context']} tokens of unseen text", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    draw(_RESULTS, _PICTURE)
