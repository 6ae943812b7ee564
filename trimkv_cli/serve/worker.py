"""The thread that owns the engine: tickets come in from any thread, events go out as they come."""

from __future__ import annotations

import ctypes
import gc
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from trimkv_cli.errors import TrimkvError
from trimkv_cli.events import TokenEvent
from trimkv_cli.request import Request
from trimkv_cli.serve.histories import Histories, History
from trimkv_cli.streams import Every

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine

T = TypeVar("T")

_LOOK_S = 0.25


class Busy(TrimkvError):
    """Report that as many requests wait as may wait."""


class Closing(TrimkvError):
    """Report that the server takes no more requests, or ends one that it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Say how many requests may wait, and when a model that nobody asks is given up (None = never)."""

    most_waiting: int = 256
    idle_s: float | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket:
    """One request to the engine, and who hears of it; callbacks run in the worker's thread and must not block.

    `make` returns the request that goes on from the history that `find` found, or None when it cannot; without a
    history, the one that reads all. `left` says what its row holds in the end, None to keep nothing. A batch's tickets
    run in rows that others leave free, and give them back: `restarted` says that what was heard so far counts no more.
    """

    make: Callable[[Engine, History | None], Request | None]
    take: Callable[[TokenEvent], None]
    fail: Callable[[Exception], None]
    begun: Callable[[bool], None] = lambda _: None
    find: Callable[[Histories], History | None] = lambda _: None
    left: Callable[[Engine, Request, int | None, str], History] | None = None
    batch: bool = False
    restarted: Callable[[], None] = lambda: None
    running: Request | None = None
    pieces: list[str] = field(default_factory=list)

    def hear(self, event: TokenEvent) -> None:
        """Pass an event on, and remember the text where a history needs it."""
        if self.left is not None:
            self.pieces.append(event.text)
        self.take(event)


@dataclass(slots=True, kw_only=True)
class Gauge:
    """What the worker's thread last knew, for others to read."""

    loaded: bool = False
    rows: int = 0
    positions: int = sys.maxsize  # that a prompt may take
    running: int = 0
    waiting: int = 0
    kept: int = 0
    kept_bytes: int = 0
    budget_bytes: int | None = None
    planned_bytes: int = 0
    peak_bytes: int = 0
    kv_bytes: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    continued_tokens: int = 0
    requests: int = 0
    evictions: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    loads: int = 0
    batch_done: int = 0  # lines; this and the next are for the thread of batches to write
    batch_failed: int = 0


def _closing() -> Closing:
    return Closing("the server is ending", hint="start it again")


class Worker:
    """Run one engine in one thread; load it when it is first needed, and give it up after idle time."""

    def __init__(
        self, load: Callable[[], Engine], histories: Histories, *, options: WorkerOptions | None = None
    ) -> None:
        self.gauge = Gauge()
        self.histories = histories
        self._load = load
        self._options = options or WorkerOptions()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._engine: Engine | None = None
        self._waiting: deque[Ticket] = deque()
        self._batch: deque[Ticket] = deque()
        self._running: dict[str, Ticket] = {}
        self._busy = 0  # interactive tickets that have not ended, as other threads count them
        self._lock = threading.Lock()
        self._ending = False
        self._before = Gauge()  # sums of engines that are gone
        self._look = Every(_LOOK_S, at_once=True)  # at what takes time to find out
        self._thread = threading.Thread(target=self._run, name="trimkv-engine", daemon=True)

    def start(self) -> None:
        """Start the thread and load the engine.

        Raises:
            TrimkvError: it cannot be loaded; the thread has ended.
        """
        self._thread.start()
        try:
            self.ask(lambda _: None).result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the thread; what still runs or waits fails as `Closing`."""
        self._inbox.put(self._end)
        if self._thread.is_alive():
            self._thread.join()

    def end_all(self) -> None:
        """End what runs or waits as `Closing`; the thread goes on."""
        self._inbox.put(lambda: self._fail_all(_closing()))

    def submit(self, ticket: Ticket) -> None:
        """Take a ticket.

        Raises:
            Busy: too many wait.
        """
        with self._lock:
            if not ticket.batch:
                if self._busy >= self._options.most_waiting + max(1, self.gauge.rows):
                    raise Busy(f"{self._busy} requests run or wait", hint="try again later")
                self._busy += 1
        self._inbox.put(lambda: (self._batch if ticket.batch else self._waiting).append(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Forget a ticket wherever it is; nothing more is heard of it, and its row is free within a step."""
        self._inbox.put(lambda: self._drop(ticket))

    def ask(self, question: Callable[[Engine], T]) -> Future[T]:
        """Ask something of the engine, in its thread and loaded."""
        answer: Future[T] = Future()

        def reply() -> None:
            try:
                answer.set_result(question(self._need_engine()))
            except BaseException as error:  # noqa: BLE001  it is raised where the answer is taken
                answer.set_exception(error)

        self._inbox.put(reply)
        return answer

    def _run(self) -> None:
        while not self._ending:
            self._listen()
            if self._waiting or self._batch or self._running:
                try:
                    self._step()
                except Exception as error:  # noqa: BLE001  a fault of the engine fails what it ran, not the server
                    self._give_up(error)
            self._read_gauge()
        self._fail_all(_closing())
        self._unload()

    def _listen(self) -> None:
        """Do what others asked; wait for that while there is nothing else to do, and unload after idle time."""
        if not (self._waiting or self._batch or self._running):
            idle_s = self._options.idle_s if self._engine is not None else None
            try:
                self._inbox.get(timeout=idle_s)()
            except queue.Empty:
                self._unload()
        with suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()

    def _end(self) -> None:
        self._ending = True

    def _step(self) -> None:
        try:
            engine = self._need_engine()
        except TrimkvError as error:
            self._fail_all(error)
            return
        self._admit(engine)
        for event in engine.step():
            ticket = self._running.get(event.request_id)
            if ticket is None:
                continue
            if event.finish_reason is not None:
                self._finish(engine, ticket, event)
            ticket.hear(event)

    def _admit(self, engine: Engine) -> None:
        """Hand tickets to the engine while it has rows for them: kept ones are put aside, a batch's taken back."""
        while self._waiting and self._start(engine, self._waiting[0]):
            self._waiting.popleft()
        while self._batch and not self._waiting and self._start(engine, self._batch[0]):
            self._batch.popleft()

    def _start(self, engine: Engine, ticket: Ticket) -> bool:
        """Start a ticket, or fail it; False when there is no row for it now."""
        history = ticket.find(self.histories)
        if history is not None and self._goes_on():
            return False
        if (history is None or history.state is not None) and not self._make_room(engine, ticket, but=history):
            return False
        try:
            request = self._request(engine, ticket, history)
        except Exception as error:  # noqa: BLE001  whatever is wrong with one request ends this one alone
            self._over(ticket)
            ticket.fail(error)
            return True
        engine.add(request)
        ticket.running = request
        self._running[request.id] = ticket
        ticket.begun(request.continues is not None)
        return True

    def _goes_on(self) -> bool:
        """Say whether a request that goes on has no token yet: until then its row is copied, and one is planned."""
        running = self._running.values()
        return any(
            each.running is not None and each.running.continues is not None and not each.pieces for each in running
        )

    def _request(self, engine: Engine, ticket: Ticket, history: History | None) -> Request:
        """Return a request that the engine takes: it goes on from a history where it can, whose row is then its own."""
        if history is not None:
            if history.state is not None:
                engine.kept.restore(history.state, history.id)
                history.state = None
            request = ticket.make(engine, history)
            if request is not None:
                engine.check(request)
                self.histories.take(history)
                return request
            self._make_room(engine, ticket)
        request = ticket.make(engine, None)
        assert request is not None
        engine.check(request)
        return request

    def _make_room(self, engine: Engine, ticket: Ticket, *, but: History | None = None) -> bool:
        """Free a row unless one is free: the kept row that was used longest ago, else the youngest of a batch."""
        if engine.free_rows:
            return True
        if (oldest := self.histories.oldest_in_row()) is not None:
            self.histories.put_aside(oldest, partial(engine.kept.save, oldest.id), but=but)
            engine.kept.release(oldest.id)
            return True
        young = next((each for each in reversed(self._running.values()) if each.batch), None)
        if ticket.batch or young is None:
            return False
        assert young.running is not None
        engine.abort(young.running.id)
        del self._running[young.running.id]
        young.running = None
        young.restarted()
        self._batch.appendleft(young)
        return True

    def _finish(self, engine: Engine, ticket: Ticket, event: TokenEvent) -> None:
        request = ticket.running
        assert request is not None
        del self._running[request.id]
        self._over(ticket)
        stats = event.stats
        if stats is not None:
            self._before.requests += 1
            self._before.prompt_tokens += stats.prompt_tokens - stats.shared_prefix_tokens
            self._before.completion_tokens += stats.completion_tokens
            self._before.continued_tokens += stats.continued_tokens
        if request.continues is not None and request.continues in engine.kept:
            engine.kept.release(request.continues)  # of one that failed before its first token
        if not request.keep or request.id not in engine.kept:
            return
        if ticket.left is None or event.finish_reason == "error":
            engine.kept.release(request.id)
            return
        last = event.token_ids[-1] if event.token_ids else None
        self.histories.keep(ticket.left(engine, request, last, "".join((*ticket.pieces, event.text))))

    def _drop(self, ticket: Ticket) -> None:
        for line in (self._waiting, self._batch):
            if ticket in line:
                line.remove(ticket)
                self._over(ticket)
                return
        if ticket.running is not None and self._running.pop(ticket.running.id, None) is not None:
            assert self._engine is not None
            self._engine.abort(ticket.running.id)
            self._over(ticket)

    def _over(self, ticket: Ticket) -> None:
        if not ticket.batch:
            with self._lock:
                self._busy -= 1

    def _need_engine(self) -> Engine:
        if self._engine is None:
            self._engine = self._load()
            self._before.loads += 1
            self.gauge.positions = self._engine.room(Request(id="none", prompt_token_ids=())) - 1
        return self._engine

    def _unload(self) -> None:
        """Give the model up, and the memory back to the system."""
        if self._engine is None:
            return
        self._read_gauge()
        self._before.evictions, self._before.prefill_s = self.gauge.evictions, self.gauge.prefill_s
        self._before.decode_s = self.gauge.decode_s
        self.histories.clear()
        self._engine.close()
        self._engine = None
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)

    def _give_up(self, error: Exception) -> None:
        """End everything after a fault that no request accounts for; the next one loads the engine anew."""
        if not isinstance(error, TrimkvError):
            error = TrimkvError(f"{type(error).__name__}: {error}", hint="send it again: the model is loaded anew")
        self._fail_all(error)
        self._unload()

    def _fail_all(self, error: TrimkvError) -> None:
        for ticket in (*self._running.values(), *self._waiting, *self._batch):
            if ticket.running is not None and self._engine is not None:
                self._engine.abort(ticket.running.id)
            self._over(ticket)
            ticket.fail(error)
        self._running.clear()
        self._waiting.clear()
        self._batch.clear()

    def _read_gauge(self) -> None:
        gauge, before, engine = self.gauge, self._before, self._engine
        gauge.loaded, gauge.loads = engine is not None, before.loads
        gauge.running, gauge.waiting = len(self._running), len(self._waiting) + len(self._batch)
        gauge.kept, gauge.kept_bytes = len(self.histories), self.histories.nbytes
        gauge.requests, gauge.prompt_tokens = before.requests, before.prompt_tokens
        gauge.completion_tokens, gauge.continued_tokens = before.completion_tokens, before.continued_tokens
        if engine is None:
            gauge.kv_bytes = 0
        elif not gauge.running or self._look.due():
            self._read_engine(engine)

    def _read_engine(self, engine: Engine) -> None:
        gauge, before = self.gauge, self._before
        plan, stats = engine.facts.plan, engine.stats
        gauge.rows, gauge.budget_bytes, gauge.planned_bytes = engine.max_rows, plan.budget_bytes, plan.run.total_bytes
        gauge.kv_bytes, gauge.peak_bytes = engine.kv_bytes, engine.peak_bytes
        gauge.evictions = before.evictions + engine.evicted
        gauge.prefill_s, gauge.decode_s = before.prefill_s + stats.prefill_s, before.decode_s + stats.decode_s
