"""Mistakes of the thread that owns the engine: rows that are not given back, requests that wait for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from helpers.engines import Shape, make_engine
from helpers.serving import Scripted
from trimkv_cli.errors import InputError, TrimkvError, UsageError
from trimkv_cli.events import TokenEvent
from trimkv_cli.request import Request, SamplingParams
from trimkv_cli.serve.histories import Histories, History
from trimkv_cli.serve.worker import Busy, Closing, Ticket, Worker, WorkerOptions


class Asked:
    """A ticket whose news are gathered; it reads `ids`, and goes on from what begins with them."""

    def __init__(self, name: str, ids: tuple[int, ...], count: int = 3, **more: Any) -> None:
        self.events: list[TokenEvent] = []
        self.error: Exception | None = None
        self.continued: bool | None = None
        self.over = threading.Event()
        self.name, self.ids, self.params = name, ids, SamplingParams(max_tokens=count, temperature=0.0)
        self.ticket = Ticket(
            make=self._make,
            take=self._take,
            fail=self._fail,
            begun=lambda continued: setattr(self, "continued", continued),
            find=lambda histories: histories.find_tokens(self.ids),
            left=lambda engine, request, last, _: History(
                id=request.id, fed=engine.kept.token_ids(request.id), last_token=last
            ),
            **more,
        )

    def _make(self, engine: Any, history: History | None) -> Request:
        fed = 0 if history is None else len(history.fed)
        continues = None if history is None else history.id
        ids = self.ids[fed:]
        return Request(id=self.name, prompt_token_ids=ids, params=self.params, keep=True, continues=continues)

    def _take(self, event: TokenEvent) -> None:
        self.events.append(event)
        if event.finish_reason is not None:
            self.over.set()

    def _fail(self, error: Exception) -> None:
        self.error = error
        self.over.set()

    @property
    def output(self) -> tuple[int, ...]:
        return tuple(token for event in self.events for token in event.token_ids)

    def wait(self) -> tuple[int, ...]:
        assert self.over.wait(20), f"{self.name} never ended"
        assert self.error is None
        return self.output


@pytest.fixture
def begin() -> Iterator[Callable[..., Worker]]:
    begun: list[Worker] = []

    def start(load: Callable[[], Any], *, kept: int = 2, **options: Any) -> Worker:
        worker = Worker(load, Histories(kept), options=WorkerOptions(**options))
        begun.append(worker)
        worker.start()
        return worker

    yield start
    for worker in begun:
        worker.close()


def reach(wanted: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not wanted():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_a_kept_row_comes_back_while_another_request_waits_for_the_last_free_row(
    begin: Any, tiny_model: Callable[..., Any]
) -> None:
    """Catch two requests that are promised the same free row, of which neither ever runs."""
    worker = begin(lambda: make_engine(tiny_model("qwen3"), Shape(rows=1, gate="streaming")))
    first = Asked("a", (5, 6, 7))
    worker.submit(first.ticket)
    ids = (5, 6, 7, *first.wait())
    other = Asked("b", (9, 9))
    worker.submit(other.ticket)  # puts the first one's row aside
    other.wait()
    again, anew = Asked("c", (*ids, 8)), Asked("d", (4, 4))
    hold, let_go = threading.Event(), threading.Event()
    worker.ask(lambda _: (hold.set(), let_go.wait()))
    hold.wait()
    worker.submit(anew.ticket)
    worker.submit(again.ticket)  # both come in the same moment
    let_go.set()
    anew.wait()
    again.wait()
    assert (first.continued, anew.continued, again.continued) == (False, False, True)
    (last,) = (event.stats for event in again.events if event.stats is not None)
    assert (last.continued_tokens, last.prompt_tokens) == (5, 2)


def test_going_on_gives_what_one_long_row_would(begin: Any, tiny_model: Callable[..., Any]) -> None:
    """Catch a row that was put aside and comes back as another's, or without its last token."""
    long = Asked("long", (5, 6, 7), 12)
    worker = begin(lambda: make_engine(tiny_model("qwen3"), Shape(rows=1, gate="none", deterministic=True)))
    worker.submit(long.ticket)
    whole = long.wait()
    worker.ask(lambda engine: (worker.histories.clear(), engine.kept.release("long"))).result()
    ids, said = (5, 6, 7), ()
    for turn in range(4):
        asked = Asked(f"turn {turn}", (*ids, *said))
        worker.submit(asked.ticket)
        said = (*said, *asked.wait())
        between = Asked(f"between {turn}", (turn + 20, 3))
        worker.submit(between.ticket)
        between.wait()
        assert asked.continued is (turn > 0)
    assert said == whole
    assert worker.gauge.kept <= 3


def test_what_is_cancelled_leaves_its_row_and_its_place(begin: Any) -> None:
    """Catch a row that stays taken, a place in the queue that is never given back, and news of what is cancelled."""
    engine = Scripted(max_rows=1, step_s=0.005)
    worker = begin(lambda: engine, most_waiting=1)
    for number in range(5):
        runs, waits = Asked(f"runs {number}", (1,), 1000), Asked(f"waits {number}", (2,), 1000)
        worker.submit(runs.ticket)
        worker.submit(waits.ticket)
        with pytest.raises(Busy):
            worker.submit(Asked("too many", (3,)).ticket)
        reach(lambda runs=runs: len(runs.events) > 1)
        worker.cancel(runs.ticket)
        worker.cancel(waits.ticket)
        worker.cancel(waits.ticket)
        worker.ask(lambda _: None).result()
        heard = len(runs.events)
        assert engine.queue == []
        assert waits.events == []
    reach(lambda: (worker.gauge.running, worker.gauge.waiting) == (0, 0))
    assert len(runs.events) == heard


def test_a_bad_request_ends_alone(begin: Any) -> None:
    """Catch a refusal that takes the requests beside it along."""
    worker = begin(Scripted)
    good, bad, good_too = Asked("good", (1,)), Asked("bad", (0x110000,)), Asked("good too", (2,))
    for asked in (good, bad, good_too):
        worker.submit(asked.ticket)
    assert (good.wait(), good_too.wait()) == ((1, 1, 1), (2, 2, 2))
    bad.over.wait(10)
    assert isinstance(bad.error, UsageError)


def test_a_fault_of_the_engine_fails_what_ran_and_the_next_request_loads_it_anew(begin: Any) -> None:
    """Catch a server that is dead after one fault, or that hangs all who wait."""

    class Broken(Scripted):
        def step(self) -> list[TokenEvent]:
            raise RuntimeError("the device went away")

    engines: list[Any] = [Broken(max_rows=1), Scripted()]
    worker = begin(iter(engines).__next__)
    asked = [Asked(f"{number}", (1,)) for number in range(3)]
    for each in asked:
        worker.submit(each.ticket)
    for each in asked:
        assert each.over.wait(10)
        assert "the device went away" in str(each.error)
    assert engines[0].closed
    after = Asked("after", (4,))
    worker.submit(after.ticket)
    assert after.wait() == (4, 4, 4)
    reach(lambda: worker.gauge.loads == 2)


def test_a_model_nobody_asks_is_given_up_and_loaded_when_it_is_asked_for(begin: Any) -> None:
    """Catch a model that stays, one that goes while requests come, and sums that begin anew."""
    engines: list[Scripted] = []

    def load() -> Scripted:
        engines.append(Scripted(step_s=0.01))
        return engines[-1]

    worker = begin(load, idle_s=0.3)
    for _ in range(4):
        time.sleep(0.1)
        asked = Asked("a", (1,))
        engines[-1].made.clear()
        worker.submit(asked.ticket)
        asked.wait()
        worker.cancel(asked.ticket)  # as the end of every request does
    assert len(engines) == 1
    reach(lambda: not worker.gauge.loaded)
    assert engines[0].closed
    asked = Asked("b", (1,))
    worker.submit(asked.ticket)
    asked.wait()
    reach(lambda: worker.gauge.requests == 5 and worker.gauge.loads == 2)
    assert worker.gauge.completion_tokens == 15


def test_a_model_that_cannot_be_loaded_again_fails_those_who_ask(begin: Any) -> None:
    """Catch a server that ends, or hangs, since its model's folder went while it was idle."""
    there = iter([True, False, True])

    def load() -> Scripted:
        if next(there):
            return Scripted()
        raise InputError("the folder is gone")

    worker = begin(load, idle_s=0.05)
    reach(lambda: not worker.gauge.loaded and worker.gauge.loads == 1)
    asked = Asked("a", (1,))
    worker.submit(asked.ticket)
    asked.over.wait(10)
    assert isinstance(asked.error, InputError)
    back = Asked("b", (1,))
    worker.submit(back.ticket)
    assert back.wait() == (1, 1, 1)


def test_a_model_that_cannot_be_loaded_at_the_start_is_told_there() -> None:
    """Catch a server that listens without a model."""

    def load() -> Scripted:
        raise TrimkvError("no such model")

    worker = Worker(load, Histories(1))
    with pytest.raises(TrimkvError, match="no such model"):
        worker.start()
    assert not worker._thread.is_alive()


def test_what_runs_and_waits_when_the_worker_ends_is_told(begin: Any) -> None:
    """Catch a client that waits for ever for a server that has ended."""
    worker = begin(lambda: Scripted(max_rows=1, step_s=0.005))
    asked = [Asked(f"{number}", (1,), 1000) for number in range(3)]
    for each in asked:
        worker.submit(each.ticket)
    reach(lambda: len(asked[0].events) > 0)
    worker.close()
    assert all(isinstance(each.error, Closing) for each in asked)
