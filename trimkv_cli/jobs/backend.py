"""What a job needs of whatever answers its lines: one engine here, or many on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from trimkv_cli.jobs.job import Sink, run_job
from trimkv_cli.jobs.lines import BadLine, Item
from trimkv_cli.jobs.records import Recorder
from trimkv_cli.jobs.stopping import Limits, Stop
from trimkv_cli.jobs.summary import Summary


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run over some lines: where its records go, and what may end it."""

    lines: Iterable[Item | BadLine]
    sink: Sink
    recorder: Recorder
    summary: Summary
    limits: Limits = field(default_factory=Limits)
    stop: Stop = field(default_factory=Stop)
    progress: Callable[[Summary], None] = lambda _: None


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
        self.engine = engine  # an `Engine` of jobs.job, and whatever more it can show of itself

    def run(self, job: Job) -> None:
        """Run a job to its end, or until it is stopped."""
        run_job(
            self.engine,
            job.lines,
            job.sink,
            job.recorder,
            summary=job.summary,
            progress=job.progress,
            limits=job.limits,
            stop=job.stop,
        )

    def close(self) -> None:
        """Do nothing: the engine ends with the process."""
