"""Recovery from running out of memory, caught here alone: a step is undone, and tried again smaller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from trimkv_cli.engine.model_runner import ModelRunner
from trimkv_cli.engine.scheduler import Decode, Prefill, Row, Scheduler
from trimkv_cli.errors import is_out_of_memory
from trimkv_cli.plan.choices import SMALLEST_CHUNK

Result = TypeVar("Result")


def attempt(work: Callable[[], Result], *, tries: int = 1) -> tuple[Result | None, str | None]:
    """Return what `work` returns, or None and why there was not enough memory for it."""
    try:
        return work(), None
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
    # The error's frames, which hold tensors, are gone here: what the allocator kept for them can be given back.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return (None, reason) if tries == 1 else attempt(work, tries=tries - 1)


class Recovery:
    """Undo failed steps of one engine, and make what comes next smaller.

    A decode is rolled back by its journal and runs again with half the rows; the others wait with their state. A
    prefill begins its requests anew, half as many at a time. The scheduler tries more when the shortage may have
    passed. What fails alone is tried once more as it is, then a
    prompt in smaller chunks, and is given up at last.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self.undone_steps = 0

    def undo(self, batch: Prefill | Decode) -> Sequence[Row]:
        """Undo a batch that ran out of memory; return the rows that have to be given up."""
        self.undone_steps += 1
        return self._undo_decode(batch) if isinstance(batch, Decode) else self._undo_prefill(batch)

    def _undo_decode(self, batch: Decode) -> Sequence[Row]:
        _, stuck = attempt(lambda: self._runner.undo_decode(batch.rows))
        if stuck is not None:
            return batch.rows
        if len(batch.rows) > 1:
            self._scheduler.narrow(len(batch.rows) // 2)
            return ()
        row = batch.rows[0]
        row.failures += 1
        return (row,) if row.failures > 1 else ()

    def _undo_prefill(self, batch: Prefill) -> Sequence[Row]:
        self._scheduler.forget_prefix()
        rows = [row for chunk in batch.chunks for row in (chunk.row, *chunk.twins)]
        stuck = [row for row in rows if attempt(partial(self._runner.restart, row))[1] is not None]
        if len(batch.chunks) > 1:
            self._scheduler.narrow_prefill(len(batch.chunks) // 2)
            return stuck
        return stuck or self._shrink(rows if batch.chunks[0].last else rows[:1])  # others that wait for a prefix

    def _shrink(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Give rows that read one prompt smaller chunks; return them when theirs are the smallest already."""
        size = rows[0].chunk or self._scheduler.options.prefill_chunk or len(rows[0].request.prompt_token_ids)
        for row in rows:
            row.failures += 1
        if rows[0].failures == 1:
            return ()
        if size // 2 < SMALLEST_CHUNK:
            return rows
        for row in rows:
            row.chunk, row.prefix = size // 2, ()  # cut elsewhere, it is no prefix of others
        return ()
