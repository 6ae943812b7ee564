"""Runs items through an engine: keeps it fed, and turns its events into records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from trimkv_cli.engine.request import Request
from trimkv_cli.errors import ContextOverflow, TrimkvError
from trimkv_cli.events import TokenEvent
from trimkv_cli.jobs.feed import Feed
from trimkv_cli.jobs.lines import BadLine, Item
from trimkv_cli.jobs.records import Answer, Record, Recorder, encode
from trimkv_cli.jobs.summary import Summary
from trimkv_cli.jobs.writing import Writer

_MOST_HELD = 4096  # records that wait for their turn before no more lines are taken
_BATCH = 64  # lines taken between two steps, so that a run of bad ones cannot starve the requests in flight
_IDLE_S = 0.5


class RenderedPrompt(Protocol):
    """Token ids, and where their system message ends."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def prefix_len(self) -> int: ...


class Text(Protocol):
    """The part of the engine's tokenizer that a job needs."""

    def encode(self, text: str) -> Sequence[int]: ...
    def render_chat(self, messages: Sequence[dict[str, str]], *, think: bool | None = None) -> RenderedPrompt: ...


class Engine(Protocol):
    """The part of the engine that a job needs."""

    @property
    def text(self) -> Text | None: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def has_work(self) -> bool: ...
    def check(self, request: Request) -> None: ...
    def add(self, request: Request) -> None: ...
    def step(self) -> Sequence[TokenEvent]: ...


@dataclass(slots=True, kw_only=True)
class _Running:
    index: int
    item: Item
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)


def run_job(
    engine: Engine,
    lines: Iterable[Item | BadLine],
    writer: Writer,
    recorder: Recorder,
    *,
    summary: Summary | None = None,
    progress: Callable[[Summary], None] = lambda _: None,
) -> Summary:
    """Answer every line and write its record; `progress` is called after every step and while waiting for input."""
    summary = Summary() if summary is None else summary
    with Feed(lines) as feed:
        job = _Job(engine, feed, writer, recorder, summary)
        while job.advance():
            progress(summary)
    return summary


class _Job:
    def __init__(
        self, engine: Engine, feed: Feed[Item | BadLine], writer: Writer, recorder: Recorder, summary: Summary
    ) -> None:
        self.engine = engine
        self.feed = feed
        self.writer = writer
        self.recorder = recorder
        self.summary = summary
        self.running: dict[str, _Running] = {}
        self.capacity = engine.max_rows + max(2, engine.max_rows // 4)
        self.taken = 0

    def advance(self) -> bool:
        """Take new lines and make one step; False when all is done."""
        self._admit()
        if self.engine.has_work:
            for event in self.engine.step():
                self._take(event)
        self.summary.running = len(self.running)
        return self.engine.has_work or not self.feed.exhausted

    def _admit(self) -> None:
        for _ in range(_BATCH):
            if len(self.running) >= self.capacity or self.writer.held >= _MOST_HELD:
                return
            line = self.feed.take(wait_s=0.0 if self.engine.has_work else _IDLE_S)
            if line is None:
                return
            self._start(line, self.taken)
            self.taken += 1

    def _start(self, line: Item | BadLine, index: int) -> None:
        if isinstance(line, Item):
            line = self._add(line, index)
        if isinstance(line, BadLine):
            self.summary.bad += 1
            self._write(index, self.recorder.bad_line(line))

    def _add(self, item: Item, index: int) -> Item | BadLine:
        """Hand the item to the engine; return what is wrong with it if it cannot be run."""
        self.summary.count_warnings(item)
        request = make_request(item, self.engine.text)
        if isinstance(request, BadLine):
            return request
        try:
            self.engine.check(request)
        except TrimkvError as error:
            return _refused(item, error)
        self.running[request.id] = _Running(index=index, item=item)
        self.engine.add(request)
        return item

    def _take(self, event: TokenEvent) -> None:
        running = self.running[event.request_id]
        running.token_ids.extend(event.token_ids)
        running.pieces.append(event.text)
        if event.finish_reason is not None:
            del self.running[event.request_id]
            self._write(running.index, self._finish(running, event))

    def _finish(self, running: _Running, event: TokenEvent) -> Record:
        if event.finish_reason not in ("stop", "length"):
            self.summary.failed += 1
            message = event.error or "the engine gave this request up"
            return self.recorder.failure(running.item, code=f"engine_{event.finish_reason}", message=message)
        assert event.stats is not None, "a request's last event carries its stats"
        self.summary.done += 1
        self.summary.count_tokens(event.stats)
        text = None if self.engine.text is None else "".join(running.pieces)
        answer = Answer(text=text, token_ids=running.token_ids, finish_reason=event.finish_reason, stats=event.stats)
        return self.recorder.success(running.item, answer)

    def _write(self, index: int, record: Record) -> None:
        self.writer.write(index, encode(record))


def make_request(item: Item, text: Text | None) -> Request | BadLine:
    """Turn an item into token ids, or say why it cannot be."""
    if item.prompt_token_ids is not None:
        return _request(item, item.prompt_token_ids, 0)
    if text is None:
        return _bad(item, "the model has no tokenizer: give prompt_token_ids", code="no_tokenizer")
    try:
        if item.messages is None:
            token_ids, prefix_len = text.encode(item.prompt or ""), 0
        else:
            rendered = text.render_chat(item.messages, think=item.think)
            token_ids, prefix_len = rendered.token_ids, rendered.prefix_len
    except TrimkvError as error:
        return _refused(item, error)
    if not token_ids:
        return _bad(item, "the prompt holds no tokens")
    return _request(item, token_ids, prefix_len)


def _request(item: Item, token_ids: Sequence[int], prefix_len: int) -> Request:
    return Request(id=f"line-{item.line}", prompt_token_ids=tuple(token_ids), params=item.params, prefix_len=prefix_len)


def _refused(item: Item, error: TrimkvError) -> BadLine:
    return _bad(item, error.message, code="context_length_exceeded" if isinstance(error, ContextOverflow) else None)


def _bad(item: Item, message: str, *, code: str | None = None) -> BadLine:
    return BadLine(line=item.line, custom_id=item.custom_id, status=400, message=message, param=item.source, code=code)
