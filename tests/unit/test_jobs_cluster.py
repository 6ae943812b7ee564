"""Mistakes in running a job on a cluster whose workers die, come back late, or are no use from the start."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from trimkv_cli.errors import OutOfDeviceMemory, TrimkvError
from trimkv_cli.jobs import cluster
from trimkv_cli.jobs.job import BackendFacts, Feed, Job
from trimkv_cli.jobs.lines import Item, Rules, parse_line
from trimkv_cli.jobs.progress import Limits, Stop, Summary
from trimkv_cli.jobs.reading import Line
from trimkv_cli.jobs.records import Recorder, encode
from trimkv_cli.jobs.writing import Order, Writer

RECORDER = Recorder(model="mini", run_seed=0, kv_budget=64, prefill_chunk=512)
FACTS = BackendFacts(
    model_id="mini",
    fingerprint={"weights": "a"},
    template="",
    sampling_defaults={},
    kv_budget=64,
    prefill_chunk=512,
    rows=4,
)
BLOCK = 4


class Exceptions:
    """The part of `ray.exceptions` that is named."""

    class RayError(Exception):
        pass

    class ActorDiedError(RayError):
        pass

    class OutOfMemoryError(RayError):
        pass

    class RayTaskError(RayError):
        def __init__(self, cause: Exception) -> None:
            super().__init__(str(cause))
            self.cause = cause


Fate = Callable[[Sequence[str]], Exception | None]  # the ids of a block → what becomes of it


def lives(_: Sequence[str]) -> None:
    """Answer every block."""


def dies(_: Sequence[str]) -> Exception:
    return Exceptions.ActorDiedError("the actor died\nits log: ...")


def dies_of(*poison: str) -> Fate:
    return lambda ids: dies(ids) if {*poison} & {*ids} else None


class FakeWorker:
    def __init__(self, ray: FakeRay, fate: Fate) -> None:
        self.ray = ray
        self.fate = fate
        self.blocks: list[list[str]] = []

    @property
    def answer(self) -> FakeWorker:
        return self

    def remote(self, items: Sequence[Item], *_: Any) -> int:
        ids = [item.custom_id for item in items]
        self.blocks.append(ids)
        return self.ray.start(self, ids, [encode(RECORDER.failure(item, code="said", message="x")) for item in items])


class FakeRay:
    """Tasks end in the order of their start when they are waited for; of blocks side by side one death takes all."""

    exceptions = Exceptions

    def __init__(self, *fates: Fate, silent: int = 0) -> None:
        self.workers = [FakeWorker(self, fate) for fate in fates]
        self.tasks: dict[int, tuple[FakeWorker, list[str], list[bytes]]] = {}
        self.ends: dict[int, Exception | None] = {}
        self.polls = 0
        self.silent = silent  # polls before anything ends
        self.last: list[int] = []  # tasks that end after all others

    def start(self, worker: FakeWorker, ids: list[str], records: list[bytes]) -> int:
        reference = len(self.tasks)
        self.tasks[reference] = (worker, ids, records)
        return reference

    def wait(self, references: list[int], *, num_returns: int, timeout: float) -> tuple[list[int], list[int]]:
        assert references
        assert timeout > 0, "a poll that does not wait spins"
        assert num_returns == 1
        self.polls += 1
        assert self.polls < 300, "this job does not end"
        if self.polls <= self.silent:
            return [], references
        first = next((r for r in references if r not in self.last), references[0])
        worker, ids, _ = self.tasks[first]
        if first not in self.ends and (error := worker.fate(ids)) is not None:
            beside = [r for r in references if self.tasks[r][0] is worker and r not in self.last]
            self.ends |= dict.fromkeys(beside, error)
        return [first], [r for r in references if r != first]

    def get(self, reference: int) -> list[bytes]:
        error = self.ends.get(reference)
        if error is not None:
            raise error
        return self.tasks[reference][2]


class Run:
    """One job over `count` lines, to its end."""

    def __init__(
        self,
        ray: FakeRay,
        count: int,
        *,
        stop: Stop | None = None,
        limits: Limits | None = None,
        order: Order = "input",
    ) -> None:
        self.out = io.BytesIO()
        self.summary = Summary()
        self.ray = ray
        texts = [json.dumps({"id": str(n), "prompt": "x"}) for n in range(count)]
        self.job = Job(
            lines=[parse_line(Line(number=n, text=text), Rules()) for n, text in enumerate(texts)],
            sink=Writer(self.out, order=order),
            recorder=RECORDER,
            summary=self.summary,
            stop=stop or Stop(),
            limits=limits or Limits(),
        )

    def go(self) -> Run:
        """Run to the end."""
        advances = 0
        with Feed(self.job.lines, ahead=1000) as feed:
            feed._thread.join()  # all lines are there: blocks are full
            self.run = cluster._Run(self.ray, list(self.ray.workers), feed, self.job, FACTS, BLOCK)
            while self.run.advance():
                advances += 1
                assert advances < 300, "this job does not end"
        return self

    @property
    def records(self) -> list[tuple[str, str]]:
        records = [json.loads(line) for line in self.out.getvalue().splitlines()]
        return [(record["custom_id"], record["error"]["code"]) for record in records]


def said(count: int, *but: str) -> list[tuple[str, str]]:
    return [(str(n), "worker_died" if str(n) in but else "said") for n in range(count)]


def test_every_line_is_answered_once_and_no_poll_is_in_vain() -> None:
    ray = FakeRay(lives, lives)
    done = Run(ray, 40).go()
    assert done.records == said(40)
    assert ray.polls == 10
    assert all(len(block) == BLOCK for worker in ray.workers for block in worker.blocks)


def test_nothing_to_do_is_done_at_once() -> None:
    ray = FakeRay(lives)
    done = Run(ray, 0).go()
    assert (done.records, ray.polls) == ([], 0)
    assert done.summary.stopped is None


def test_a_line_that_kills_every_worker_fails_alone() -> None:
    """Catches a job that one line ends, again and again, and blocks that are given up for what ran beside them."""
    for fates in ([dies_of("5")], [dies_of("5")] * 2, [dies_of("5", "14", "22")] * 3):
        ray = FakeRay(*fates)
        done = Run(ray, 40).go()
        assert done.records == said(40, "5") if len(fates) < 3 else said(40, "5", "14", "22")
        assert len(done.run.room) == len(fates), "no worker is taken out for a line's fault"


def test_a_worker_that_always_dies_is_taken_out_and_the_others_answer_all() -> None:
    """Catches a worker that dies again and again and takes the job's time, or its lines, with it."""
    ray = FakeRay(dies, lives)
    done = Run(ray, 80).go()
    assert done.records == said(80)
    assert len(ray.workers[0].blocks) <= cluster._MOST_LOST + 2
    assert list(done.run.room) == [ray.workers[1]]


def test_a_late_answer_of_a_worker_that_was_taken_out_is_written_and_does_not_bring_it_back() -> None:
    """Catches the loop that spins for ever: no room, blocks to run again, and a worker that counts as there."""
    deaths = [dies([])] * 12

    def first(_: Sequence[str]) -> Exception | None:
        return deaths.pop() if deaths else None

    ray = FakeRay(first, dies)
    ray.last = [0]  # the first worker's first block comes back when everything else has been lost
    with pytest.raises(TrimkvError, match="no worker is left: the actor died") as caught:
        Run(ray, 200, order="completion").go()
    assert caught.value.exit_code == 1
    assert "resumes" in (caught.value.hint or "")
    assert ray.polls <= 4 * cluster._MOST_LOST


def test_when_all_are_lost_what_is_written_is_whole_and_the_rest_is_not_told_as_failed() -> None:
    """Catches lines marked as failed, which a resumed job would pass over, because the cluster went away."""
    blocks = 0

    def three_blocks(_: Sequence[str]) -> Exception | None:
        nonlocal blocks
        blocks += 1
        return dies([]) if blocks > 3 else None

    done = Run(FakeRay(three_blocks), 40)
    with pytest.raises(TrimkvError, match="no worker is left"):
        done.go()
    assert done.records == said(3 * BLOCK)


@pytest.mark.parametrize(
    "error",
    [
        Exceptions.OutOfMemoryError("killed by the memory monitor"),
        Exceptions.RayTaskError(OutOfDeviceMemory("the device is out of memory")),
    ],
)
def test_workers_that_all_run_out_of_memory_end_with_exit_5(error: Exception) -> None:
    """Catches an exit code that says nothing of memory."""
    ray = FakeRay(lambda _: error, lambda _: error)
    with pytest.raises(OutOfDeviceMemory, match=r"no worker is left: .*memory") as caught:
        Run(ray, 400).go()
    assert caught.value.exit_code == 5
    assert ray.polls < 20


def test_a_worker_that_cannot_load_is_out_at_once_and_its_lines_go_elsewhere() -> None:
    """Catches a broken worker that is given five blocks, and lines that fail for it."""
    ray = FakeRay(lambda _: Exceptions.RayTaskError(TrimkvError("no gates here")), lives)
    done = Run(ray, 40).go()
    assert done.records == said(40)
    assert len(ray.workers[0].blocks) == 2


def test_a_stop_waits_for_blocks_within_the_grace_and_sends_nothing_new() -> None:
    """Catches a stopped job that goes on, polls without waiting, or drops what was nearly done."""
    ray = FakeRay(lives)
    stop = Stop()

    def ask(_: Sequence[str]) -> None:
        stop.ask("signal")

    ray.workers[0].fate = ask
    done = Run(ray, 40, stop=stop, limits=Limits(grace_s=60)).go()
    assert done.records == said(2 * BLOCK)
    assert (done.summary.stopped, ray.polls) == ("signal", 2)


def test_a_stop_without_grace_drops_blocks_that_do_not_end() -> None:
    stop = Stop()
    stop.ask("signal")
    ray = FakeRay(lives, silent=1000)
    done = Run(ray, 40, stop=stop, limits=Limits(grace_s=0)).go()
    assert (done.records, done.summary.stopped, ray.polls) == ([], "signal", 0)


def test_a_first_error_under_fail_fast_does_not_wait_for_the_grace() -> None:
    """Catches a job that goes on for ten seconds after what should end it at once."""
    ray = FakeRay(lives)  # its records are failures
    done = Run(ray, 40, limits=Limits(fail_fast=True, grace_s=600)).go()
    assert (len(done.records), done.summary.stopped, ray.polls) == (BLOCK, "errors", 1)
