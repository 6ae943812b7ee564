"""The tables and the plot of what the built-in model remembers, from the recorded results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trimkv_cli.eval.results import Row
from trimkv_cli.ui.accuracy import accuracy_plot


def mini_tables(results: Path) -> str:
    """Return recall as tables, stories, the points of long notes, and a long conversation, in Markdown."""
    names = ("recall", "stories", "points", "long-chat")
    recall, stories, points, chat = (_rows(results / f"{name}-mini.json") for name in names)
    lengths = dict.fromkeys(row["context"] for row in recall)
    made = (*(_recall(recall, length) for length in lengths), _stories(stories), _points(points), _long_chat(chat))
    return "\n\n".join(made)


def mini_plot(results: Path) -> str:
    """Return recall at the first length as a plot for a block of text."""
    recall = _rows(results / "recall-mini.json")
    return _plot(recall, recall[0]["context"])


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_bytes())["rows"]
    return rows


def _recall(rows: Sequence[dict[str, Any]], length: int) -> str:
    head = f"recall by mini: six facts in conversations of about {length:,} tokens"
    return _markdown(
        (head, "exact answers", "95 % interval", "log p per answer token", "questions"),
        (
            (
                _policy(row),
                f"{row['accuracy']:.0%}",
                f"{row['ci95'][0]:.0%} to {row['ci95'][1]:.0%}",
                f"{row['answer_logprob']:.3f}",
                str(row["n"]),
            )
            for row in rows
            if row["context"] == length
        ),
    )


def _plot(rows: Sequence[dict[str, Any]], length: int) -> str:
    shown = [Row(**{**row, "ci95": tuple(row["ci95"])}) for row in rows if row["context"] == length]
    return f"```text\n{accuracy_plot('recall', shown)}\n```"


def _policy(row: dict[str, Any]) -> str:
    return row["policy"] if row["kv_budget"] is None else f"{row['policy']}, M = {row['kv_budget']}"


def _stories(rows: Sequence[dict[str, Any]]) -> str:
    columns = dict.fromkeys(f"about {row['tokens']:,} tokens, asked {row['asked']}" for row in rows)
    lines: dict[str, list[str]] = {}
    for row in rows:
        lines.setdefault(_policy(row), []).append(f"{row['accuracy']:.0%}")
    head = f"stories of four facts, {rows[0]['n']} questions of each kind"
    return _markdown((head, *columns), ((policy, *cells) for policy, cells in lines.items()))


def _points(rows: Sequence[dict[str, Any]]) -> str:
    head = f"notes files of {rows[0]['points'] // rows[0]['files']} marked points, M = {rows[0]['kv_budget']}"
    return _markdown(
        (head, "points that `summarize` lists", "lines invented", "bytes of the cache"),
        (
            (
                f"{row['files']} of about {row['tokens']:,} tokens",
                f"{row['listed']} of {row['points']} ({row['listed'] / row['points']:.0%})",
                str(row["invented"]),
                f"{row['kv_bytes']:,}",
            )
            for row in rows
        ),
    )


def _long_chat(rows: Sequence[dict[str, Any]]) -> str:
    head = f"facts told in the first 500 tokens, {rows[0]['n']} questions about them after"
    return _markdown(
        (head, *(f"{tokens:,}" for tokens in rows[0]["tokens"])),
        ((_policy(row), *(f"{a:.0%}" for a in row["accuracy"])) for row in rows),
    )


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])
