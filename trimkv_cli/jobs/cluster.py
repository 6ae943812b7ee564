"""A Ray cluster as a backend: blocks of lines go to workers, each with an engine of its own."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from trimkv_cli.errors import DoesNotFit, OutOfDeviceMemory, TrimkvError, UsageError
from trimkv_cli.jobs.job import MOST_HELD, BackendFacts, Feed, Job, JobEngine, run_job
from trimkv_cli.jobs.lines import BadLine, Item
from trimkv_cli.jobs.progress import Limits
from trimkv_cli.jobs.records import Recorder, encode

_RETRIES = 1  # that Ray makes of a block whose worker died
_BLOCKS_PER_WORKER = 2  # one is answered while the next one's lines wait in the engine
_POLL_S = 0.2
# Blocks in a row that a worker may lose: two that ran side by side, one of them alone, and the line that is at fault.
_MOST_LOST = 4
_RESUMES = "what is written is whole: with -o FILE the same command resumes"
_OBJECT_STORE_BYTES = 128 << 20  # of a cluster of our own: blocks and records are small
_DEFAULT_CPUS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """Where the cluster is, and how large a worker: one GPU, or where there are none so many CPUs."""

    address: str | None = None  # None = start one on this machine
    cpus_per_worker: int | None = None


class RayBackend:
    """Feed workers with blocks, and write what comes back; Ray places them, restarts them and repeats their blocks."""

    memory = None  # of workers on other machines nothing is known here

    def __init__(self, load: Load, options: ClusterOptions) -> None:
        self._ray = _join(options)
        try:
            self._workers, self.facts = self._start(load, options)
        except BaseException:
            self._ray.shutdown()
            raise

    def run(self, job: Job) -> None:
        """Run a job to its end, or until it is stopped.

        Raises:
            TrimkvError: no worker is left, or the input cannot be read any further.
        """
        with Feed(job.lines, ahead=2 * self._block_lines) as feed:
            run = _Run(self._ray, self._workers, feed, job, self.facts, self._block_lines)
            try:
                while run.advance():
                    job.progress(job.summary)
            except self._ray.exceptions.RayError as error:
                raise TrimkvError(f"the cluster is gone: {_first_line(error)}", hint=_RESUMES) from error
        if run.input_error is not None:
            raise run.input_error

    def close(self) -> None:
        """Leave the cluster; one of our own ends."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._ray.shutdown()

    @property
    def _block_lines(self) -> int:
        return max(8, 2 * self.facts.rows)

    def _start(self, load: Load, options: ClusterOptions) -> tuple[list[Any], BackendFacts]:
        count, resources = _layout(self._ray.cluster_resources(), options)
        actor = self._ray.remote(Worker).options(
            max_restarts=-1, max_task_retries=_RETRIES, max_concurrency=_BLOCKS_PER_WORKER + 1, **resources
        )
        threads = resources["num_cpus"] or None
        first = actor.remote(load, threads, None)
        try:
            facts: BackendFacts = self._ray.get(first.facts.remote())
        except self._ray.exceptions.RayError as error:
            raise _load_error(error) from error
        # The others take the sizes that the first one's plan chose: all have to give the same tokens.
        return [first, *(actor.remote(load, threads, facts.fingerprint) for _ in range(count - 1))], facts


@dataclass(slots=True)
class _Block:
    """Lines that travel together; `losses` counts the times that a worker died over them, Ray's own retries aside."""

    lines: list[tuple[int, Item]]  # with their places in the input
    worker: Any = None
    losses: int = 0

    @property
    def room(self) -> int:
        """Return how much of a worker it takes: a block that was lost runs alone, so that no other dies of it."""
        return _BLOCKS_PER_WORKER if self.losses else 1


class _Run:
    """One job on the cluster: which worker runs what is Ray's to know, here is only who has room."""

    def __init__(
        self, ray: Any, workers: list[Any], feed: Feed[Item | BadLine], job: Job, facts: BackendFacts, block_lines: int
    ) -> None:
        self.ray = ray
        self.feed = feed
        self.job = job
        self.facts = facts
        self.block_lines = block_lines
        self.room = dict.fromkeys(workers, _BLOCKS_PER_WORKER)  # of the workers that still get blocks
        self.lost = dict.fromkeys(workers, 0)  # blocks in a row
        self.last_error: Exception | None = None
        self.pending: dict[Any, _Block] = {}  # by Ray's reference
        self.again: deque[_Block] = deque()
        self.suspects: list[tuple[int, Item, str]] = []  # lines over which workers died: at fault once another answers
        self.taken = 0
        self.input_error: TrimkvError | None = None

    def advance(self) -> bool:
        """Send blocks to workers that have room and take what has come back; False when all is done, or dropped.

        Raises:
            TrimkvError: lines are left, and no worker to answer them.
        """
        summary, stop, limits = self.job.summary, self.job.stop, self.job.limits
        if stop.reason is None:
            self._send()
        self._receive()
        summary.running = sum(len(block.lines) for block in (*self.pending.values(), *self.again))
        self.job.heed_limits()
        left = bool(self.pending or self.again) or not self.feed.exhausted
        if not left:
            self._give_up_suspects()
        if stop.reason is not None and (not self.pending or stop.over(limits.grace_for(stop.reason))):
            summary.stopped = stop.reason if left else None
            return False
        if left and not self.room and not self.pending:
            raise self._no_worker_left()
        return left

    def _send(self) -> None:
        for worker in list(self.room):
            while self.room[worker] and (not self.again or self._may_try(worker, self.again[0])):
                block = self.again.popleft() if self.again else self._new_block()
                if block is None:
                    return
                limits = Limits(timeout_s=self.job.limits.timeout_s)
                items = [item for _, item in block.lines]
                reference = worker.answer.remote(items, self.job.recorder, limits, self.facts.fingerprint)
                block.worker = worker
                self.room[worker] -= block.room
                self.pending[reference] = block

    def _may_try(self, worker: Any, block: _Block) -> bool:
        """Say whether a lost block may run here: it waits for an idle worker, another than its last where there is one.

        While it waits nobody gets new lines.
        """
        is_idle = self.room[worker] == _BLOCKS_PER_WORKER
        return is_idle and (block.worker is not worker or len(self.room) == 1)

    def _new_block(self) -> _Block | None:
        """Take the lines that are there, without waiting for a block to be full; bad ones need no worker."""
        lines: list[tuple[int, Item]] = []
        while len(lines) < self.block_lines and self.job.sink.held < MOST_HELD:
            if self.job.limits.too_many_errors(self.job.summary):
                break
            line = self._next_line(wait_s=0.0 if lines or self.pending else _POLL_S)
            if line is None:
                break
            index, self.taken = self.taken, self.taken + 1
            if isinstance(line, Item):
                self.job.summary.count_warnings(line)
                lines.append((index, line))
            else:
                self.job.summary.bad += 1
                self.job.sink.write(index, encode(self.job.recorder.bad_line(line)))
        return _Block(lines) if lines else None

    def _next_line(self, *, wait_s: float) -> Item | BadLine | None:
        try:
            return self.feed.take(wait_s=wait_s)
        except TrimkvError as error:  # the feed counts as exhausted now
            self.input_error = error
            return None

    def _receive(self) -> None:
        if not self.pending:
            return
        ready, _ = self.ray.wait(list(self.pending), num_returns=1, timeout=_POLL_S)
        for reference in ready:
            block = self.pending.pop(reference)
            if block.worker in self.room:  # a worker that was taken out stays out, whatever it still answers
                self.room[block.worker] += block.room
            try:
                records = self.ray.get(reference)
            except self.ray.exceptions.RayTaskError as error:
                self._refused(block, error)
            except self.ray.exceptions.RayError as error:
                self._lost(block, error)
            else:
                self.lost[block.worker] = 0
                self._give_up_suspects()
                for (index, _), record in zip(block.lines, records, strict=True):
                    self._write(index, record)

    def _refused(self, block: _Block, error: Exception) -> None:
        """Take out a worker that lives and cannot answer: its engine did not load, or is another one."""
        self.last_error = error
        self.room.pop(block.worker, None)
        self.again.append(block)

    def _lost(self, block: _Block, error: Exception) -> None:
        """Try a block whose worker died again, alone, then line by line; take out a worker that dies of everything."""
        self.last_error = error
        block.losses += 1
        self.lost[block.worker] += 1
        if self.lost[block.worker] > _MOST_LOST:
            self.room.pop(block.worker, None)
        if block.losses == 1:
            self.again.append(block)
        elif len(block.lines) > 1:
            self.again.extendleft(_Block([line], losses=1) for line in reversed(block.lines))
        else:
            self.suspects += [(index, item, _first_line(error)) for index, item in block.lines]

    def _give_up_suspects(self) -> None:
        for index, item, message in self.suspects:
            self._write(index, encode(self.job.recorder.failure(item, code="worker_died", message=message)))
        self.suspects.clear()

    def _no_worker_left(self) -> TrimkvError:
        assert self.last_error is not None, "a worker goes with an error"
        cause = getattr(self.last_error, "cause", None)
        is_memory = isinstance(cause, OutOfDeviceMemory) or isinstance(
            self.last_error, self.ray.exceptions.OutOfMemoryError
        )
        reason = cause.message if isinstance(cause, TrimkvError) else _first_line(self.last_error)
        kind = OutOfDeviceMemory if is_memory else TrimkvError
        return kind(f"no worker is left: {reason}", hint=_RESUMES)

    def _write(self, index: int, record: bytes) -> None:
        self.job.summary.count_record(orjson.loads(record))
        self.job.sink.write(index, record)


def _join(options: ClusterOptions) -> Any:
    """Connect to the cluster, or start one on this machine.

    Raises:
        UsageError: ray is not installed, or there is no cluster at the address.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray needs Ray", hint="pip install 'trimkv-cli[ray]'") from error
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    own = {} if options.address else own
    try:
        ray.init(address=options.address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError) as error:
        raise UsageError(
            f"cannot join a Ray cluster: {_first_line(error)}", hint="--address auto, or none for a local one"
        ) from error
    return ray


def _layout(resources: Mapping[str, float], options: ClusterOptions) -> tuple[int, dict[str, int]]:
    """Return how many workers the cluster holds and what each takes.

    Raises:
        DoesNotFit: not even one.
    """
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if gpus and options.cpus_per_worker is None:
        return gpus, {"num_gpus": 1, "num_cpus": 0}
    each = options.cpus_per_worker or min(_DEFAULT_CPUS, max(1, cpus))
    if each > cpus:
        raise DoesNotFit(f"a worker takes {each} CPUs, and the cluster has {cpus}", hint=f"--cpus-per-worker {cpus}")
    return cpus // each, {"num_cpus": each}


def _load_error(error: Exception) -> TrimkvError:
    """Return the error of a worker that could not load its engine, as it would have been raised here."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, TrimkvError):
        return cause
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return TrimkvError(f"no worker could start: {lines[-1]}", hint="does trimkv ask load the model?")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# (CPUs of the worker, fingerprint of the first one) → its engine
Load = Callable[[int | None, Mapping[str, str] | None], tuple[JobEngine, BackendFacts]]


@dataclass(slots=True)
class _Ticket:
    """A block on its way through a worker."""

    records: list[bytes | None]
    left: int
    done: threading.Event = field(default_factory=threading.Event)


class Worker:
    """One engine that runs all the time; blocks come and go, and its rows never wait for a block to end."""

    def __init__(self, load: Load, threads: int | None, sizes: Mapping[str, str] | None) -> None:
        self._fault: TrimkvError | None = None
        try:
            self._engine, self._facts = load(threads, sizes)
        except TrimkvError as error:
            self._fault = error  # raised by `facts`: what an actor's constructor raises reaches nobody as it is
        self._lines: queue.SimpleQueue[Item | BadLine] = queue.SimpleQueue()
        self._places: dict[int, tuple[_Ticket, int]] = {}  # by the order in which the loop takes them
        self._taken = 0
        self._lock = threading.Lock()
        self._loop: threading.Thread | None = None

    def facts(self) -> BackendFacts:
        """Say what this worker runs; raises what kept it from loading."""
        if self._fault is not None:
            raise self._fault
        return self._facts

    def pid(self) -> int:
        return os.getpid()

    def answer(
        self, block: Sequence[Item], recorder: Recorder, limits: Limits, fingerprint: Mapping[str, str]
    ) -> list[bytes | None]:
        """Return one encoded record per item."""
        if self.facts().fingerprint != fingerprint:
            raise ValueError("this worker runs another model, or other sizes, than the first one")
        ticket = _Ticket([None] * len(block), len(block))
        with self._lock:
            for place, item in enumerate(block):
                self._places[self._taken] = (ticket, place)
                self._taken += 1
                self._lines.put(item)
            if self._loop is None:
                self._loop = threading.Thread(target=self._run, args=(recorder, limits), daemon=True)
                self._loop.start()
        ticket.done.wait()
        return ticket.records

    @property
    def held(self) -> int:
        return 0

    def write(self, index: int, data: bytes) -> None:
        """Take a record from the loop and give it to its block."""
        ticket, place = self._places.pop(index)
        ticket.records[place] = data
        ticket.left -= 1
        if ticket.left == 0:
            ticket.done.set()

    def _run(self, recorder: Recorder, limits: Limits) -> None:
        try:
            run_job(self._engine, Job(lines=self._endless(), sink=self, recorder=recorder, limits=limits))
        except BaseException:  # noqa: BLE001  whatever it is, this process is of no use any more: Ray starts another
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def _endless(self) -> Iterator[Item | BadLine]:
        while True:
            yield self._lines.get()
