"""One forward of training: its positions, its documents, and whose attention it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trimkv_cli.train.options import Border


@dataclass(frozen=True, slots=True)
class TeacherStates:
    """What the teacher's forward left of each layer: what entered its attention `[B, T, hidden]`, keys and values.

    Of the queries it keeps those of the `columns` `[B, Nq]`, scaled.
    """

    columns: Tensor | None = None
    queries: dict[int, Tensor] = field(default_factory=dict)  # [B, Hq, Nq, D]
    hidden: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)  # [B, Hkv, T, D], as values
    values: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPass:
    """Say what one forward sees, and whether it is the student's.

    Several documents may share a row; none sees another. The student leaves each layer's `log_beta` `[B, Hkv, T]` in
    `log_betas`. A fading one sees all tokens. An evicting one has a border, and computes the `columns` alone: it sees
    what the slots would hold there of what the teacher has read.
    """

    positions: Tensor  # [B, T] int64, increasing within a document
    documents: Tensor  # [B, T] int64, −1 = padding
    gated: bool
    border: Border | None = None
    one_document: bool = False  # no row has more than one, so that order alone says what is visible
    teacher: TeacherStates | None = None
    columns: Tensor | None = None  # [B, Tq] int64: which tokens are queries; None: all
    log_betas: dict[int, Tensor] = field(default_factory=dict)

    def reach(self, queries: slice) -> int:
        """Return how many tokens some of the queries may see."""
        return queries.stop if self.columns is None else int(self.columns[:, queries].max()) + 1

    def at(self, each: Tensor, queries: slice) -> Tensor:
        """Return what the queries have of `each` token `[B, T]`: `[B, Tq]`."""
        return each[:, queries] if self.columns is None else each.gather(1, self.columns[:, queries])

    def distances(self, queries: slice, keys: slice) -> Tensor:
        """Return how many positions each query is after each key: `[B, Tq, Tk]`, float32."""
        return (self.at(self.positions, queries)[:, :, None] - self.positions[:, None, keys]).float()

    def visible(self, queries: slice, keys: slice, distances: Tensor, window: int | None) -> Tensor:
        """Return which keys each query may see: `[B, Tq, Tk]`."""
        index = torch.arange(self.positions.shape[1], device=self.positions.device).expand_as(self.positions)
        seen = self.at(index, queries)[:, :, None] >= index[:, None, keys]
        seen = seen & (self.at(self.documents, queries)[:, :, None] == self.documents[:, None, keys])
        return seen if window is None else seen & (distances < window)


recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def in_query_blocks(
    attend_block: Callable[..., Tensor],
    query: Tensor,
    *states: Tensor,
    size: int,
    keep: bool,
    reach: Callable[[slice], int],
) -> Tensor:
    """Attend from `size` queries at a time, `[B, H, Tq, D]`, to the `states` that they `reach`, `[B, Hkv, T, …]`.

    What lives at a time is size · T, never T · T, unless the backward pass is to find all of it kept. `attend_block` is
    called with the queries, those states, and which the queries are: `queries=slice`.
    """
    length, outputs = query.shape[2], []
    for start in range(0, length, size):
        queries = slice(start, min(start + size, length))
        attend = partial(attend_block, queries=queries)
        inputs = query[:, :, queries], *(each[:, :, : reach(queries)] for each in states)
        outputs.append(attend(*inputs) if keep else recompute(attend, *inputs))
    return torch.cat(outputs, dim=2)
