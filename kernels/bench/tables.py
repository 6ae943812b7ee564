"""The README's one table: the figure of each record that a reader asks for first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.llama_table import llama_rows
from bench.recall_table import recall_rows
from trimkv_cli.eval.scoring import EvalResult
from trimkv_cli.ui.accuracy import accuracy_plot


def headline(results: Path) -> str:
    """Return the table in Markdown, from the records in `results`."""

    def read(name: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((results / f"{name}.json").read_bytes())
        return record

    rows = [
        *llama_rows(results),
        *recall_rows(results),
        ("`make mini`: its weights and gates, from nothing", f"{read('make-mini')['real_s'] / 60:.0f} minutes"),
        *_stream(read("stream-cpu")),
        *_decode_speed(read("speed-10m-cpu")),
        *_batches(read("batching-mini"), read("kills-mini")),
    ]
    return "\n".join(
        ["| measured, on 2 CPU cores | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    )


def _stream(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    value = f"{record['kv_bytes_min']:,} and {record['kv_bytes_max']:,}"
    yield f"bytes of the cache, at the first and at the last of {record['steps']:,} tokens", value


def _decode_speed(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
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
    shown = [EvalResult(**{**row, "ci95": tuple(row["ci95"])}) for row in rows if row["context"] == length]
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


SPEED_RECORDS = tuple(f"speed-10m-cpu{rest}.json" for rest in ("", "-8-rows", "-int4"))
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
    held = record.get("quantize", "none")
    weights = "" if held == "none" else f", {held} weights"
    own = {(row["context"], row["rows"]): row for row in record["rows"] if row["engine"] == "trimkv"}
    full = {(row["context"], row["rows"]): row for row in record["rows"] if row["engine"] == "hf"}
    for case, row in own.items():
        other = full[case]
        context, rows = case
        ratio = row["decode_tps"] / other["decode_tps"]
        many = "row" if rows == 1 else "rows"
        speeds = f"{row['decode_tps']:,.0f} tok/s | {other['decode_tps']:,.0f} tok/s"
        yield f"| after {context:,} tokens, {rows} {many}{weights} | {speeds} | × {ratio:.1f} |"
