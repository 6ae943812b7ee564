"""The JSON objects of the output, one per input line, in the shapes of the OpenAI batch format."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import orjson

from trimkv_cli.events import Answer, FinishReason, Notice, RequestStats, TokenEvent, TokenLogprob
from trimkv_cli.jobs.lines import BadLine, Item
from trimkv_cli.jobs.requests import Tokenizer
from trimkv_cli.jobs.tool_calls import CallParser, gather

# Characters that JSON may carry raw, but that move a terminal's cursor or that str.splitlines() takes for a line's end.
_UNSAFE = re.compile(rb"\x7f|\xc2[\x80-\x9f]|\xe2\x80[\xa8\xa9]")

Record = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorder:
    """Build records; `reproducible` leaves out whatever differs from one run to the next."""

    model: str
    run_seed: int
    kv_budget: int
    prefill_chunk: int
    reproducible: bool = False
    memory: Callable[[], Record] | None = None  # budget and memory as they are now

    def success(self, item: Item, answers: Sequence[Answer], text: Tokenizer | None) -> Record:
        """Return the record of an answered item, with all its choices; without a tokenizer it has only token ids."""
        body = self.body(item, answers, text)
        return self._record(self._key(item.custom_id), item.custom_id, status=200, body=body)

    def bad_line(self, bad: BadLine) -> Record:
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

    def body(self, item: Item, answers: Sequence[Answer], text: Tokenizer | None) -> Record:
        """Return what answers an item: OpenAI's completion, with all its choices."""
        said = [_said(item, index, answer, text) for index, answer in enumerate(answers)]
        notices = [notice for each in said for notice in each.notices]
        return {
            **self.head(item),
            "choices": [_choice(item, index, answer, text, said[index]) for index, answer in enumerate(answers)],
            **self.tail(item, answers, notices),
        }

    def head(self, item: Item, *, chunk: bool = False) -> Record:
        """Return what a completion, or each of its chunks, begins with."""
        completion = item.kind == "completion"
        chat = "chat.completion.chunk" if chunk else "chat.completion"
        return {
            "id": f"{'cmpl' if completion else 'chatcmpl'}-{self._key(item.custom_id)}",
            "object": "text_completion" if completion else chat,
            "created": 0 if self.reproducible else int(time.time()),
            "model": self.model,
        }

    def tail(self, item: Item, answers: Sequence[Answer], notices: Sequence[Notice] = ()) -> Record:
        """Return what a completion ends with: its usage, and what else there is to know, also of its calls."""
        stats = [answer.stats for answer in answers]
        return {"usage": self._usage(stats), "trimkv": self._trimkv(item, stats, notices)}

    def _usage(self, stats: Sequence[RequestStats]) -> Record:
        continued = stats[0].continued_tokens
        prompt = stats[0].prompt_tokens + continued
        completion = sum(each.completion_tokens for each in stats)
        usage: Record = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            **stats[0].details(*stats[1:]),
        }
        if not self.reproducible:
            usage["prompt_tokens_details"] = {
                "cached_tokens": continued + min(each.shared_prefix_tokens for each in stats)
            }
        return usage

    def _trimkv(self, item: Item, stats: Sequence[RequestStats], notices: Sequence[Notice]) -> Record:
        extra: Record = {
            "line": item.line,
            "seed": item.params.seed,
            "kv_budget": self.kv_budget,
            "prefill_chunk": stats[0].prefill_chunk or self.prefill_chunk,
            "cache": asdict(stats[0].cache),
            "warnings": [asdict(warning) for warning in (*item.warnings, *stats[0].warnings, *notices)],
        }
        if not self.reproducible and self.memory is not None:
            extra |= self.memory()
        if not self.reproducible:
            extra["timing"] = {
                "queue_s": stats[0].queue_s,
                "ttft_s": stats[0].ttft_s,
                "total_s": max(each.total_s for each in stats),
            }
        return extra


def encode(record: Record) -> bytes:
    """Return one line of JSON that every reader takes for one line, and that is safe to show in a terminal."""
    return _UNSAFE.sub(_escape, orjson.dumps(record)) + b"\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """An answer's text without the calls in it, and those."""

    content: str | None
    calls: Sequence[Record] = ()
    notices: tuple[Notice, ...] = ()


def _said(item: Item, index: int, answer: Answer, text: Tokenizer | None) -> _Said:
    if text is None:
        return _Said(content=None)
    parser = CallParser.of(item, text.template.text, choice=index)
    if parser is None:
        return _Said(content=answer.text)
    content, calls = gather([*parser.push(answer.text), *parser.finish()])
    return _Said(content=content or None if calls else content, calls=calls, notices=parser.notices)


def _choice(item: Item, index: int, answer: Answer, text: Tokenizer | None, said: _Said) -> Record:
    choice: Record = {"index": index}
    completion = item.kind == "completion"
    if completion:
        choice["text"] = "" if text is None else answer.text
    else:
        choice["message"] = {"role": "assistant", "content": said.content, "refusal": None}
    if said.calls:
        choice["message"]["tool_calls"] = said.calls
    logprobs = None
    if item.params.logprobs is not None:
        logprobs = logprobs_of(item, answer, text)
    choice |= {"finish_reason": finish_reason(answer.finish_reason, len(said.calls)), "logprobs": logprobs}
    if item.return_token_ids:
        choice["token_ids"] = answer.token_ids
    return choice


def finish_reason(reason: FinishReason | None, calls: int) -> str | None:
    """Return `choices[].finish_reason` of an answer with so many calls in it."""
    return "tool_calls" if calls and reason == "stop" else reason


def _escape(match: re.Match[bytes]) -> bytes:
    return f"\\u{ord(match[0].decode()):04x}".encode()


_LOWEST = -9999.0  # how OpenAI's API writes the logarithm of nothing: JSON has no infinity
_NO_CHARACTER = "\ufffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedLogprob:
    """A token's text and log probability, and those of the likeliest tokens of its step."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


def name_tokens(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprob], text_of: Callable[[int], str]
) -> list[NamedLogprob]:
    """Put texts in the place of ids."""
    return [
        NamedLogprob(
            token=text_of(token_id),
            logprob=max(said.logprob, _LOWEST),
            top=tuple((text_of(other), max(logprob, _LOWEST)) for other, logprob in said.top),
        )
        for token_id, said in zip(token_ids, logprobs, strict=True)
    ]


def logprobs_of(item: Item, said: Answer | TokenEvent, text: Tokenizer | None, *, offset: int = 0) -> Record:
    """Return `choices[].logprobs` of some tokens; a completion's stand `offset` characters after its beginning."""
    named = name_tokens(said.token_ids, said.logprobs, _nameless if text is None else text.token_text)
    return completion_logprobs(named, offset=offset) if item.kind == "completion" else chat_logprobs(named)


def _nameless(token_id: int) -> str:
    return f"token_id:{token_id}"


def chat_logprobs(tokens: Sequence[NamedLogprob]) -> dict[str, Any]:
    """Return `choices[].logprobs` of a chat completion."""
    content = [
        {**_entry(token.token, token.logprob), "top_logprobs": [_entry(*other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[NamedLogprob], *, offset: int = 0) -> dict[str, Any]:
    """Return `choices[].logprobs` of a text completion; of tokens with the same text the likeliest counts."""
    texts = [token.token for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(reversed(token.top)) for token in tokens],
        "text_offset": [*accumulate(map(len, texts), initial=offset)][: len(texts)],
    }


def _entry(token: str, logprob: float) -> dict[str, Any]:
    raw = None if _NO_CHARACTER in token else list(token.encode("utf-8", "surrogatepass"))
    return {"token": token, "logprob": logprob, "bytes": raw}
