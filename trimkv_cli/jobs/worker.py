"""One worker of a cluster: an engine that runs all the time while blocks of lines come and go."""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from trimkv_cli.errors import TrimkvError
from trimkv_cli.jobs.backend import BackendFacts
from trimkv_cli.jobs.job import Engine, run_job
from trimkv_cli.jobs.lines import BadLine, Item
from trimkv_cli.jobs.records import Recorder
from trimkv_cli.jobs.stopping import Limits

# (CPUs of the worker, fingerprint of the first one) → its engine
Load = Callable[[int | None, Mapping[str, str] | None], tuple[Engine, BackendFacts]]


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
        """Return the process that this worker is."""
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
            run_job(self._engine, self._endless(), self, recorder, limits=limits)
        except BaseException:  # noqa: BLE001  whatever it is, this process is of no use any more: Ray starts another
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def _endless(self) -> Iterator[Item | BadLine]:
        while True:
            yield self._lines.get()
