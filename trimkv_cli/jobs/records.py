"""Builds the JSON objects of the output, one per input line, in the shapes of the OpenAI batch format."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from trimkv_cli.events import RequestStats
from trimkv_cli.jobs.lines import BadLine, Item

# Characters that JSON may carry raw, but that move a terminal's cursor or that str.splitlines() takes for a line's end.
_UNSAFE = re.compile(rb"\x7f|\xc2[\x80-\x9f]|\xe2\x80[\xa8\xa9]")

Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the engine made of one item; `text` is None without a tokenizer."""

    text: str | None
    token_ids: Sequence[int]
    finish_reason: str
    stats: RequestStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorder:
    """Build records; `reproducible` leaves out whatever differs from one run to the next."""

    model: str
    run_seed: int
    kv_budget: int
    prefill_chunk: int
    reproducible: bool = False

    def success(self, item: Item, answer: Answer) -> Record:
        """Return the record of an answered item."""
        return self._record(self._key(item.custom_id), item.custom_id, status=200, body=self._body(item, answer))

    def bad_line(self, bad: BadLine) -> Record:
        """Return the record of a line that was refused."""
        key = self._key(f"{bad.custom_id}\0{bad.line}")
        if bad.status is None:
            return self._failure(key, bad.custom_id, bad.line, code=bad.code, message=bad.message)
        error = {"message": bad.message, "type": bad.type, "param": bad.param, "code": bad.code}
        record = self._record(key, bad.custom_id, status=bad.status, body={"error": error})
        return {**record, "trimkv": {"line": bad.line}}

    def failure(self, item: Item, *, code: str, message: str) -> Record:
        """Return the record of an item that failed through no fault of its own."""
        return self._failure(self._key(item.custom_id), item.custom_id, item.line, code=code, message=message)

    def _key(self, text: str) -> str:
        return hashlib.sha256(f"{self.run_seed}\0{text}".encode()).hexdigest()[:24]

    def _record(self, key: str, custom_id: str | None, *, status: int, body: Record) -> Record:
        response = {"status_code": status, "request_id": f"req_{key}", "body": body}
        return {"id": f"batch_req_{key}", "custom_id": custom_id, "response": response, "error": None}

    def _failure(self, key: str, custom_id: str | None, line: int, *, code: str | None, message: str) -> Record:
        error = {"code": code, "message": message}
        record: Record = {"id": f"batch_req_{key}", "custom_id": custom_id, "response": None, "error": error}
        return {**record, "trimkv": {"line": line}}

    def _body(self, item: Item, answer: Answer) -> Record:
        completion = item.kind == "completion"
        return {
            "id": f"{'cmpl' if completion else 'chatcmpl'}-{self._key(item.custom_id)}",
            "object": "text_completion" if completion else "chat.completion",
            "created": 0 if self.reproducible else int(time.time()),
            "model": self.model,
            "choices": [_choice(item, answer)],
            "usage": self._usage(answer.stats),
            "trimkv": self._trimkv(item, answer.stats),
        }

    def _usage(self, stats: RequestStats) -> Record:
        usage: Record = {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.completion_tokens,
            "total_tokens": stats.prompt_tokens + stats.completion_tokens,
        }
        if not self.reproducible:
            usage["prompt_tokens_details"] = {"cached_tokens": stats.shared_prefix_tokens}
        return usage

    def _trimkv(self, item: Item, stats: RequestStats) -> Record:
        extra: Record = {
            "line": item.line,
            "seed": item.params.seed,
            "kv_budget": self.kv_budget,
            "prefill_chunk": self.prefill_chunk,
            "cache": asdict(stats.cache),
            "warnings": [asdict(warning) for warning in item.warnings],
        }
        if not self.reproducible:
            extra["timing"] = {"queue_s": stats.queue_s, "ttft_s": stats.ttft_s, "total_s": stats.total_s}
        return extra


def encode(record: Record) -> bytes:
    """Return one line of JSON that every reader takes for one line, and that is safe to show in a terminal."""
    return _UNSAFE.sub(_escape, orjson.dumps(record)) + b"\n"


def _choice(item: Item, answer: Answer) -> Record:
    choice: Record = {"index": 0}
    if item.kind == "completion":
        choice["text"] = answer.text or ""
    else:
        choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
    choice |= {"finish_reason": answer.finish_reason, "logprobs": None}
    if item.return_token_ids:
        choice["token_ids"] = list(answer.token_ids)
    return choice


def _escape(match: re.Match[bytes]) -> bytes:
    return f"\\u{ord(match[0].decode()):04x}".encode()
