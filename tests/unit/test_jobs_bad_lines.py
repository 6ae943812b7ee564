"""Mistakes in an input that holds every kind of bad line: each gets one precise record, and the good ones an answer."""

from __future__ import annotations

import io
import json
from typing import Any

from helpers.fake_engine import RECORDER, FakeEngine, FakeText
from trimkv_cli.jobs.job import Job, run_job
from trimkv_cli.jobs.lines import Rules
from trimkv_cli.jobs.reading import LineReader
from trimkv_cli.jobs.selection import parse_lines
from trimkv_cli.jobs.writing import Writer


def chat(**body: Any) -> bytes:
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, **body}
    return json.dumps({"custom_id": "good", "url": "/v1/chat/completions", "body": body}).encode()


# Each line, and what its error says.
LINES: list[tuple[bytes, str]] = [
    (chat(), ""),
    (b'{"prompt": "a\xc3(", "id": 1}', "invalid UTF-8 at byte 14"),
    (b'{"prompt": "a"', "invalid JSON at column 15"),
    (b'{"prompt": "' + b"x" * (50 << 20) + b'"}', "the line is longer than 16,777,216 bytes"),
    (chat(), "custom_id 'good' was used by an earlier line"),
    (b'{"id": "types", "prompt": "a", "max_tokens": "8", "stop": 5}', "max_tokens: input should be a valid integer"),
    (b'{"custom_id": "url", "url": "/v1/embeddings", "body": {"input": "a"}}', "unknown url '/v1/embeddings'"),
    (chat(stream=True).replace(b"good", b"stream"), "stream: not supported with this value"),
    (chat(messages=[]).replace(b"good", b"empty"), "messages: list should have at least 1 item"),
    (b'{"id": "long", "prompt": "' + b"y" * 101 + b'"}', "101 tokens need more positions"),
    (b'{"id": "nan", "prompt": "a", "temperature": NaN}', "temperature: input should be a finite number"),
    (b'{"id": "deep", "prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "invalid JSON at column"),
    (b"\x00\x01\x02", "NUL byte at byte 1"),
    (b'{"id": "token", "prompt_token_ids": [99999999999]}', "token id outside the vocabulary"),
    (b'"text"', "a line is a JSON object, not a string"),
    (b'{"id": "last", "prompt": "ab", "max_tokens": 2}', ""),
]


def test_every_bad_line_is_told_where_it_stands_and_what_is_wrong() -> None:
    out = io.BytesIO()
    items = parse_lines(LineReader(io.BytesIO(b"\n".join(line for line, _ in LINES))), Rules())
    summary = run_job(FakeEngine(text=FakeText()), Job(lines=items, sink=Writer(out, order="input"), recorder=RECORDER))
    records = [json.loads(line) for line in out.getvalue().splitlines()]
    assert len(records) == len(LINES)
    assert (summary.done, summary.bad, summary.failed) == (2, len(LINES) - 2, 0)
    for number, (record, (_, message)) in enumerate(zip(records, LINES, strict=True), 1):
        if not message:
            assert record["response"]["status_code"] == 200
            continue
        assert record["trimkv"] == {"line": number}
        response = record["response"]
        said = record["error"]["message"] if response is None else response["body"]["error"]["message"]
        assert message in said, (number, said)
