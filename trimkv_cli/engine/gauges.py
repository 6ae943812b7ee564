"""What an engine is made of, and what can be read off it while it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch.utils.hooks import RemovableHandle

from trimkv_cli.engine.devices import measured_peaks, peak_bytes
from trimkv_cli.engine.facts import EngineFacts
from trimkv_cli.engine.model_runner import ModelRunner
from trimkv_cli.engine.recovery import Recovery
from trimkv_cli.engine.scheduler import Decode, Prefill, Scheduler
from trimkv_cli.engine.snapshot import Glancer
from trimkv_cli.engine.text import Detokenizer, Text
from trimkv_cli.events import Glance, RunStats


@dataclass(slots=True, kw_only=True)
class Progress:
    """What the engine remembers of a request beside its row."""

    detokenizer: Detokenizer | None
    added: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    first_token: float | None = None


class Gauges:
    """Hold the parts of an engine, and count what they do."""

    def __init__(
        self,
        *,
        facts: EngineFacts,
        runner: ModelRunner,
        scheduler: Scheduler,
        text: Text | None,
        fingerprint: Mapping[str, str],
        hooks: Sequence[RemovableHandle] = (),
        compact: bool = True,
    ) -> None:
        self.facts = facts
        self.text = text
        self.fingerprint = fingerprint
        self._runner = runner
        self._scheduler = scheduler
        self._hooks = hooks
        self._compact = compact
        self._glancer = Glancer(runner.cache)
        self._evicted = 0
        self._progress: dict[str, Progress] = {}
        self._recovery = Recovery(runner, scheduler)
        self._counts = {"prefill_tokens": 0, "decode_tokens": 0, "shared_prefix_tokens": 0, "steps": 0}
        self._seconds = {Prefill: 0.0, Decode: 0.0}

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def max_rows(self) -> int:
        return self._scheduler.options.max_rows

    @property
    def kv_bytes(self) -> int:
        return self._runner.cache.nbytes

    @property
    def peak_bytes(self) -> int:
        return peak_bytes(self._runner.device)

    def measured_peaks(self) -> dict[str, int]:
        """Return the largest sizes so far by who counts them: the process, and on a GPU allocator and NVML."""
        return measured_peaks(self._runner.device)

    @property
    def stats(self) -> RunStats:
        return RunStats(
            prefill_s=self._seconds[Prefill],
            decode_s=self._seconds[Decode],
            undone_steps=self._recovery.undone_steps,
            **self._counts,
        )

    @property
    def evicted(self) -> int:
        """Count the (layer, head) slots lost so far, by requests that run and that have ended."""
        running = self._scheduler.running.values()
        return self._evicted + sum(self._runner.cache.evicted(row.index) for row in running)

    @property
    def reading(self) -> tuple[int, int]:
        """Count the prompt tokens that were read, and all there are, of the requests that still read theirs."""
        rows = [row for row in self._scheduler.running.values() if row.prefilling]
        waiting = sum(len(request.prompt_token_ids) for request in self._scheduler.waiting)
        whole = sum(len(row.request.prompt_token_ids) for row in rows)
        return sum(row.fed for row in rows), whole + waiting

    @property
    def first_token_s(self) -> float | None:
        """Return how long the oldest running request waited for its first token; None while it still does."""
        row = next(iter(self._scheduler.running.values()), None)
        progress = None if row is None else self._progress[row.request.id]
        if progress is None or progress.first_token is None:
            return None
        return progress.first_token - progress.added

    def glance(self) -> Glance | None:
        """Look at what the oldest running request's row holds; cheap, and never waits for the device."""
        row = next(iter(self._scheduler.running.values()), None)
        return None if row is None else self._glancer.take(row.index)
