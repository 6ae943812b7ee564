"""An engine without a model: each request is answered with its own prompt. And a job that runs through it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from trimkv_cli.errors import ContextOverflow, UnsupportedModel, UsageError
from trimkv_cli.events import CacheStats, FinishReason, RequestStats, TokenEvent
from trimkv_cli.jobs.job import Job, run_job
from trimkv_cli.jobs.lines import Rules
from trimkv_cli.jobs.progress import Summary
from trimkv_cli.jobs.reading import LineReader
from trimkv_cli.jobs.records import Recorder
from trimkv_cli.jobs.selection import parse_lines
from trimkv_cli.jobs.writing import Order, Writer
from trimkv_cli.request import Request


class FakePrompt:
    def __init__(self, token_ids: Sequence[int], prefix_len: int) -> None:
        self.token_ids = token_ids
        self.prefix_len = prefix_len


class FakeTemplate:
    """None that the commands would ask for, and none that tells the form of calls."""

    hash = ""

    def __init__(self, text: str = "") -> None:
        self.text = text

    def __bool__(self) -> bool:
        return False


class FakeText:
    """One token per character; a template that marks each message's beginning with 0."""

    template = FakeTemplate()

    def added_id(self, token: str) -> int | None:
        return None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return [1] if special and self.named_tokens(text) else [ord(c) for c in text]

    def named_tokens(self, text: str) -> list[str]:
        return ["<s>"] if "<s>" in text else []

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def render_chat(
        self, messages: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]] = (), think: bool | None = None
    ) -> FakePrompt:
        if messages[-1]["role"] == "assistant":
            raise UnsupportedModel("the template cannot end with the assistant")
        ids = [i for m in messages for i in (0, *map(ord, m["content"]))]
        return FakePrompt(ids, 1 + len(messages[0]["content"]) if messages[0]["role"] == "system" else 0)


class FakeEngine:
    """Answer each request with its own prompt, one token per step; a prompt that begins with "!" fails half-way."""

    def __init__(
        self, *, max_rows: int = 2, text: FakeText | None = None, max_positions: int = 100, starts_at: int = 0
    ) -> None:
        self.starts_at = starts_at  # requests that have to be there before it begins
        self.text = text
        self.max_rows = max_rows
        self.max_positions = max_positions
        self.queue: list[Request] = []
        self.made: dict[str, int] = {}
        self.most_queued = 0

    @property
    def has_work(self) -> bool:
        return bool(self.queue) and len(self.made) >= self.starts_at

    def room(self, request: Request) -> int:
        return self.max_positions - len(request.prompt_token_ids) + 1

    def check(self, request: Request) -> None:
        if max(request.prompt_token_ids) > 0x10FFFF:
            raise UsageError("token id outside the vocabulary")
        if request.params.max_tokens > 1000:
            raise ContextOverflow("1001 tokens to generate are too many", param="max_tokens")
        if len(request.prompt_token_ids) > self.max_positions:
            raise ContextOverflow(f"{len(request.prompt_token_ids)} tokens need more positions than there are")

    def add(self, request: Request) -> None:
        assert request.id not in self.made
        self.queue.append(request)
        self.made[request.id] = 0
        self.most_queued = max(self.most_queued, len(self.queue))

    def abort(self, request_id: str) -> None:
        self.queue = [request for request in self.queue if request.id != request_id]

    def running_s(self, request_id: str) -> float:
        return float(self.made[request_id])

    def step(self) -> list[TokenEvent]:
        return [self._advance(request) for request in self.queue[: self.max_rows]]

    def _advance(self, request: Request) -> TokenEvent:
        done = self.made[request.id] = self.made[request.id] + 1
        prompt, token = request.prompt_token_ids, request.prompt_token_ids[(done - 1) % len(request.prompt_token_ids)]
        if prompt[0] == ord("!") and done == 2:
            return self._end(request, "error", (), "the device went away")
        if done == request.params.max_tokens:
            return self._end(request, "length", (token,), None)
        return TokenEvent(request_id=request.id, token_ids=(token,), text=chr(token) if self.text else "")

    def _end(self, request: Request, reason: FinishReason, ids: tuple[int, ...], error: str | None) -> TokenEvent:
        self.queue.remove(request)
        stats = RequestStats(
            prompt_tokens=len(request.prompt_token_ids),
            completion_tokens=self.made[request.id],
            shared_prefix_tokens=0,
            queue_s=0.0,
            ttft_s=0.1,
            total_s=0.2,
            cache=CacheStats(seen_tokens=9, kept_per_head=4, evicted=5),
        )
        text = "".join(map(chr, ids)) if self.text else ""
        return TokenEvent(
            request_id=request.id, token_ids=ids, text=text, finish_reason=reason, stats=stats, error=error
        )


RECORDER = Recorder(model="mini", run_seed=0, kv_budget=64, prefill_chunk=512)


def by_id(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(records, key=lambda record: str(record["custom_id"]))


def run(
    lines: Iterable[Any],
    *,
    engine: FakeEngine | None = None,
    order: Order = "completion",
    recorder: Recorder = RECORDER,
    **rules: Any,
) -> tuple[list[dict[str, Any]], Summary]:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    out = io.BytesIO()
    items = parse_lines(LineReader(io.BytesIO("\n".join(texts).encode())), Rules(**rules))
    job = Job(lines=items, sink=Writer(out, order=order), recorder=recorder)
    summary = run_job(engine or FakeEngine(text=FakeText()), job)
    return [json.loads(line) for line in out.getvalue().splitlines()], summary
