"""One batch job: lines in, a record of each out, answered by one engine here or by many on a cluster."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from trimkv_cli.errors import TrimkvError
from trimkv_cli.events import Answer, TokenEvent
from trimkv_cli.jobs.lines import BadLine, Item
from trimkv_cli.jobs.progress import Limits, Stop, Summary
from trimkv_cli.jobs.records import Record, Recorder, encode
from trimkv_cli.jobs.requests import Tokenizer, fitted, make_requests, refused, with_warnings
from trimkv_cli.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendFacts:
    """What does not change while a backend lives."""

    model_id: str
    fingerprint: Mapping[str, str]
    template: str
    sampling_defaults: Mapping[str, Any]
    kv_budget: int
    prefill_chunk: int
    rows: int
    warnings: tuple[str, ...] = ()  # to be said before the job begins

    @classmethod
    def of(cls, engine: Any) -> BackendFacts:
        """Say what a job needs to know of an engine."""
        facts = engine.facts
        return cls(
            model_id=facts.model_id,
            fingerprint=dict(engine.fingerprint),
            template="" if engine.text is None else engine.text.template.hash,
            sampling_defaults=dict(facts.sampling_defaults),
            kv_budget=facts.plan.run.kv_budget,
            prefill_chunk=facts.plan.run.prefill_chunk,
            rows=engine.max_rows,
            warnings=tuple(warning.message for warning in facts.warnings),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run over some lines: where its records go, and what may end it."""

    lines: Iterable[Item | BadLine]
    sink: Sink
    recorder: Recorder
    summary: Summary = field(default_factory=Summary)
    limits: Limits = field(default_factory=Limits)
    stop: Stop = field(default_factory=Stop)
    progress: Callable[[Summary], None] = lambda _: None

    def heed_limits(self) -> None:
        """Ask for the end once its time is over, or too many lines have failed."""
        if self.limits.max_time_s is not None and self.summary.elapsed_s > self.limits.max_time_s:
            self.stop.ask("time")
        if self.limits.too_many_errors(self.summary):
            self.stop.ask("errors")


class Backend(Protocol):
    """Answers lines."""

    @property
    def facts(self) -> BackendFacts: ...
    @property
    def memory(self) -> Callable[[], dict[str, Any]] | None: ...
    def run(self, job: Job) -> None: ...
    def close(self) -> None: ...


class LocalBackend:
    """Answer lines with one engine in this process."""

    def __init__(self, engine: Any, facts: BackendFacts, memory: Callable[[], dict[str, Any]] | None = None) -> None:
        self.facts = facts
        self.memory = memory  # what each record says of budget and memory
        self.engine = engine  # a `JobEngine`, and whatever more it can show of itself

    def run(self, job: Job) -> None:
        run_job(self.engine, job)

    def close(self) -> None:
        """Do nothing: the engine ends with the process."""


MOST_HELD = 4096  # records that wait for their turn before no more lines are taken
_BATCH = 64  # lines taken between two steps, so that a run of bad ones cannot starve the requests in flight
_FEWEST_WAITING = 16  # requests among which the engine finds those that share a prefix
_IDLE_S = 0.5


class JobEngine(Protocol):
    """The part of the engine that a job needs."""

    @property
    def text(self) -> Tokenizer | None: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def has_work(self) -> bool: ...
    def check(self, request: Request) -> None: ...
    def room(self, request: Request) -> int: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def running_s(self, request_id: str) -> float: ...
    def step(self) -> Sequence[TokenEvent]: ...


class Sink(Protocol):
    """Where encoded records go."""

    @property
    def held(self) -> int: ...
    def write(self, index: int, data: bytes) -> None: ...


@dataclass(slots=True, kw_only=True)
class _Running:
    index: int
    item: Item
    choices: dict[str, Answer]  # by request id


def run_job(engine: JobEngine, job: Job) -> Summary:
    """Answer every line and write its record; `job.progress` is called after every step and while waiting for input.

    A job that is stopped says so in `summary.stopped`; what it had not finished by then is not written.

    Raises:
        TrimkvError: the input cannot be read any further; what was read is answered and written first.
    """
    with Feed(job.lines) as feed:
        loop = _Loop(engine, feed, job)
        while loop.advance():
            job.progress(job.summary)
    if loop.input_error is not None:
        raise loop.input_error
    return job.summary


class _Loop:
    """A job between two steps of its engine."""

    def __init__(self, engine: JobEngine, feed: Feed[Item | BadLine], job: Job) -> None:
        self.engine = engine
        self.feed = feed
        self.job = job
        self.summary, self.limits, self.stop = job.summary, job.limits, job.stop
        self.running: dict[str, _Running] = {}  # by request id: an item with several choices stands here several times
        self.capacity = engine.max_rows + max(_FEWEST_WAITING, engine.max_rows)
        self.taken = 0
        self.winding_up = self.dropped = False
        self.input_error: TrimkvError | None = None

    def advance(self) -> bool:
        """Take new lines and make one step; False when all is done, or dropped."""
        if self.stop.reason is None:
            self._admit()
        if self.engine.has_work:
            for event in self.engine.step():
                self._take(event)
        self._end_late_ones()
        self.job.heed_limits()
        self.summary.running = len({running.index for running in self.running.values()})
        if self.stop.reason is not None:
            return self._wind_up()
        return self.engine.has_work or not self.feed.exhausted

    def _wind_up(self) -> bool:
        """Let rows in flight end; when their time is over, or none is left, drop the rest."""
        if not self.winding_up:
            self.winding_up = True
            self._drop(running for running in self.running.values() if self._waits(running))
        assert self.stop.reason is not None
        if self.running and not self.stop.over(self.limits.grace_for(self.stop.reason)):
            return True
        self._drop(self.running.values())
        if self.dropped or not self.feed.exhausted:
            self.summary.stopped = self.stop.reason
        return False

    def _waits(self, running: _Running) -> bool:
        """Tell whether no choice of an item has a row yet, nor had one."""
        return all(
            request_id in self.running and self.engine.running_s(request_id) == 0.0 for request_id in running.choices
        )

    def _drop(self, items: Iterable[_Running]) -> None:
        """Forget items without a record, so that a later run takes them."""
        for running in list(items):
            for request_id in running.choices:
                if self.running.pop(request_id, None) is not None:
                    self.engine.abort(request_id)
                    self.dropped = True

    def _admit(self) -> None:
        for _ in range(_BATCH):
            if len(self.running) >= self.capacity or self.job.sink.held >= MOST_HELD:
                return
            line = self._next_line()
            if line is None:
                return
            self._start(line, self.taken)
            self.taken += 1
            if self.limits.too_many_errors(self.summary):
                return

    def _next_line(self) -> Item | BadLine | None:
        try:
            return self.feed.take(wait_s=0.0 if self.engine.has_work else _IDLE_S)
        except TrimkvError as error:  # the feed counts as exhausted now
            self.input_error = error
            return None

    def _start(self, line: Item | BadLine, index: int) -> None:
        if isinstance(line, Item):
            line = self._add(line, index)
        if isinstance(line, BadLine):
            self.summary.bad += 1
            self._write(index, self.job.recorder.bad_line(line))

    def _add(self, item: Item, index: int) -> Item | BadLine:
        """Hand the item to the engine; return what is wrong with it if it cannot be run."""
        item = with_warnings(item, self.engine.text)
        requests = make_requests(item, self.engine.text)
        if isinstance(requests, BadLine):
            self.summary.count_warnings(item)
            return requests
        requests, item = fitted(requests, item, self.engine.room(requests[0]))
        self.summary.count_warnings(item)
        try:
            self.engine.check(requests[0])  # the others differ in their seeds
        except TrimkvError as error:
            return refused(item, error)
        running = _Running(index=index, item=item, choices={request.id: Answer(request) for request in requests})
        for request in requests:
            self.running[request.id] = running
            self.engine.add(request)
        return item

    def _take(self, event: TokenEvent) -> None:
        running = self.running.get(event.request_id)
        if running is None:
            return  # another choice of the item failed in this step
        running.choices[event.request_id].take(event)
        if event.finish_reason is None:
            return
        del self.running[event.request_id]
        if event.finish_reason not in ("stop", "length"):
            message = event.error or "the engine gave this request up"
            self._fail(running, event.error_code or f"engine_{event.finish_reason}", message)
        elif all(choice.last is not None for choice in running.choices.values()):
            self._succeed(running)

    def _succeed(self, running: _Running) -> None:
        answers = list(running.choices.values())
        self.summary.done += 1
        self.summary.count_tokens([answer.stats for answer in answers])
        self._write(running.index, self.job.recorder.success(running.item, answers, self.engine.text))

    def _fail(self, running: _Running, code: str, message: str) -> None:
        """Write that an item failed, and drop what is left of its choices."""
        for request_id in running.choices:
            if self.running.pop(request_id, None) is not None:
                self.engine.abort(request_id)
        self.summary.failed += 1
        self._write(running.index, self.job.recorder.failure(running.item, code=code, message=message))

    def _end_late_ones(self) -> None:
        limit_s = self.limits.timeout_s
        if limit_s is None:
            return
        for request_id, running in list(self.running.items()):
            if request_id in self.running and self.engine.running_s(request_id) > limit_s:
                self._fail(running, "timeout", f"no complete answer within {limit_s:g} s")

    def _write(self, index: int, record: Record) -> None:
        self.job.sink.write(index, encode(record))


T = TypeVar("T")

_PUT_TIMEOUT_S = 0.2


class _End:
    """Close the queue; carries what the source raised."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Feed(Generic[T]):
    """Take items from `source` as they come, with at most `ahead` of them read in advance."""

    def __init__(self, source: Iterable[T], *, ahead: int = 64) -> None:
        self.exhausted = False
        self._queue: queue.Queue[T | _End] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(source,), name="trimkv-input", daemon=True)
        self._thread.start()

    def take(self, *, wait_s: float = 0.0) -> T | None:
        """Return the next item, or None when there is none yet (see `exhausted`); re-raises the source's error."""
        if self.exhausted:
            return None
        try:
            item = self._queue.get(timeout=wait_s) if wait_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None
        if not isinstance(item, _End):
            return item
        self.exhausted = True
        if item.error is not None:
            raise item.error
        return None

    def close(self) -> None:
        """Stop reading; a thread that is blocked in the source is left behind."""
        self._closed.set()
        self._thread.join(timeout=2 * _PUT_TIMEOUT_S)

    def __enter__(self) -> Feed[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read(self, source: Iterable[T]) -> None:
        try:
            for item in source:
                if not self._put(item):
                    return
        except BaseException as error:  # noqa: BLE001  it is raised where the items are taken
            self._put(_End(error))
        else:
            self._put(_End())

    def _put(self, item: T | _End) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_PUT_TIMEOUT_S)
            except queue.Full:
                continue
            return True
        return False
