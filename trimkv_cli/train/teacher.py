"""The teacher's part of each micro-batch; on a CPU a thread of its own reads ahead.

The teacher does not depend on the gates, so nothing that comes out depends on when it reads. Two threads that share
each of a small model's products are hardly faster than one; two that have work of their own are. Products of a large
model are better shared, and its batches too big to wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_cli.engine.devices import on_threads, prepare_training
from trimkv_cli.model.spec import ModelSpec
from trimkv_cli.train.options import TrainOptions
from trimkv_cli.train.packing import PADDING, Batch
from trimkv_cli.train.training_pass import TeacherStates

MOST_AHEAD = 3  # batches; some take the teacher longer than the student, some not
WAITING_BYTES = 1 << 26  # of batches that wait, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The tokens of a step, all its micro-batches together, so that splitting it changes no mean."""

    wanted: int
    real: int  # no padding
    watched: float  # the sum of its queries' weights

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Counts:
        return cls(
            wanted=max(1, sum(int(batch.wanted.sum()) for batch in batches)),
            real=sum(int((batch.documents != PADDING).sum()) for batch in batches),
            watched=max(1e-6, sum(float(batch.watched.sum()) for batch in batches)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherBatch:
    """A micro-batch, its step's counts, what it asks for, and the teacher's states of that: `[B, N, hidden]`.

    They enter the output embedding. An evicting student learns from what the teacher has read, too, and from the
    attention of the queries that `watched` weighs, where there are any.
    """

    batch: Batch
    counts: Counts
    asked: Tensor  # as `Batch.asked` gives them
    real: Tensor
    states: Tensor
    layers: TeacherStates | None
    watched: Tensor | None = None  # [B, Nq], of the columns in `layers`


def batches_ahead(spec: ModelSpec, options: TrainOptions) -> int:
    """Return how many batches of this shape may wait; 0 for those of a large model."""
    numel = spec.hidden_size
    if options.student == "evicting":
        numel += spec.num_layers * (spec.hidden_size + 2 * spec.num_kv_heads * spec.head_dim)
    return min(MOST_AHEAD, WAITING_BYTES // (4 * options.batch * options.context * numel))


@contextmanager
def prefetch(batches: Iterator[TeacherBatch], count: int) -> Iterator[Iterator[TeacherBatch]]:
    """Have another thread prepare the next batches, `count` at most, while the caller works on the last one.

    The two share this thread's threads. An error comes where its batch would.
    """
    threads = torch.get_num_threads()
    theirs = threads // 2
    with (
        on_threads(threads - theirs),
        ThreadPoolExecutor(1, thread_name_prefix="teacher", initializer=prepare_training, initargs=(theirs,)) as pool,
    ):
        yield _drawn(pool, batches, count)


def _drawn(pool: ThreadPoolExecutor, batches: Iterator[TeacherBatch], count: int) -> Iterator[TeacherBatch]:
    waiting = deque(pool.submit(next, batches, None) for _ in range(count))
    while (batch := waiting.popleft().result()) is not None:
        waiting.append(pool.submit(next, batches, None))
        yield batch
