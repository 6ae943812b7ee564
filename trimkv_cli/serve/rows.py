"""The rows that interactive requests leave free, as a batch's job sees them: an engine whose answers come whole."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trimkv_cli.errors import TrimkvError
from trimkv_cli.events import Answer, TokenEvent
from trimkv_cli.jobs.requests import Tokenizer
from trimkv_cli.request import Request
from trimkv_cli.serve.histories import History
from trimkv_cli.serve.worker import Closing, Ticket, Worker

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine

_WAIT_S = 0.2
_TRIES = 2  # of a request that failed through no fault of its own


@dataclass(slots=True, eq=False, kw_only=True)
class _Sent:
    """A request on its way, and what has been heard of it since it got its row for the last time."""

    request: Request
    ready: queue.SimpleQueue[_Sent]
    answer: Answer
    ticket: Ticket = field(init=False)
    started: float | None = None
    tries: int = 1
    ended: TokenEvent | None = None
    fault: Exception | None = None

    def begun(self, _: bool) -> None:
        self.started = time.perf_counter()

    def restarted(self) -> None:
        self.started, self.answer = None, Answer(self.request)

    def take(self, event: TokenEvent) -> None:
        self.answer.take(event)
        if event.finish_reason is not None:
            self.ended = replace(
                event,
                request_id=self.request.id,
                token_ids=tuple(self.answer.token_ids),
                text=self.answer.text,
                logprobs=tuple(self.answer.logprobs),
            )
            self.ready.put(self)

    def fail(self, error: Exception) -> None:
        self.fault = error
        self.ready.put(self)


class SpareRows:
    """Hand the requests of one batch to a worker, as a `JobEngine`; close it, which ends those that still run.

    A row may be taken back at any time, and its request begins anew later: so nothing is said of a request before it
    has ended. For one thread.
    """

    def __init__(self, worker: Worker, text: Tokenizer | None, *, name: str) -> None:
        self.text = text
        self._worker = worker
        self._name = name  # ids of requests are a job's own: the engine hears them with this before them
        self._sent: dict[str, _Sent] = {}
        self._ready: queue.SimpleQueue[_Sent] = queue.SimpleQueue()
        self.max_rows, self._positions = worker.ask(_sizes).result()

    @property
    def has_work(self) -> bool:
        return bool(self._sent)

    def check(self, request: Request) -> None:
        """Raise as the engine does."""
        self._worker.ask(lambda engine: engine.check(request)).result()

    def room(self, request: Request) -> int:
        """Return how many tokens may follow the request's prompt."""
        return self._positions - len(request.prompt_token_ids) + 1

    def add(self, request: Request) -> None:
        """Queue a request."""
        sent = _Sent(request=request, ready=self._ready, answer=Answer(request))
        self._sent[request.id] = sent
        self._submit(sent)

    def abort(self, request_id: str) -> None:
        """Drop a request; no event comes of it."""
        sent = self._sent.pop(request_id, None)
        if sent is not None:
            self._worker.cancel(sent.ticket)

    def running_s(self, request_id: str) -> float:
        """Return how long ago a request got its row, 0 when it waits for one."""
        started = self._sent[request_id].started
        return 0.0 if started is None else time.perf_counter() - started

    def step(self) -> Sequence[TokenEvent]:
        """Wait a moment for requests to end, and return one event for each that has.

        Raises:
            TrimkvError: the engine fails whatever it is given.
        """
        ended: list[_Sent] = []
        try:
            ended.append(self._ready.get(timeout=_WAIT_S))
            while True:
                ended.append(self._ready.get_nowait())
        except queue.Empty:
            return [event for sent in ended if (event := self._event(sent)) is not None]

    def close(self) -> None:
        """Drop all that still run."""
        for request_id in list(self._sent):
            self.abort(request_id)

    def _event(self, sent: _Sent) -> TokenEvent | None:
        if self._sent.get(sent.request.id) is not sent:
            return None  # dropped in the meantime
        if sent.ended is not None:
            del self._sent[sent.request.id]
            return sent.ended
        fault = sent.fault
        assert fault is not None
        if sent.tries == _TRIES or isinstance(fault, Closing):
            if not isinstance(fault, TrimkvError):
                fault = TrimkvError(f"{type(fault).__name__}: {fault}", hint="the next server goes on with the batch")
            raise fault
        sent.tries, sent.fault = sent.tries + 1, None
        sent.restarted()
        self._submit(sent)
        return None

    def _submit(self, sent: _Sent) -> None:
        request, group = sent.request, sent.request.same_prompt
        named = replace(
            request,
            id=f"{self._name}/{request.id}",
            same_prompt=None if group is None else f"{self._name}/{group}",
        )

        def make(_: Engine, __: History | None) -> Request:
            return named

        sent.ticket = Ticket(
            make=make, take=sent.take, fail=sent.fail, begun=sent.begun, restarted=sent.restarted, batch=True
        )
        self._worker.submit(sent.ticket)


def _sizes(engine: Engine) -> tuple[int, int]:
    """Return how many rows there are, and the positions of one."""
    return engine.max_rows, engine.room(Request(id="", prompt_token_ids=(0,)))
