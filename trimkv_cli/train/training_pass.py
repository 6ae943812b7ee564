"""What one forward of training sees: positions, documents, and whose attention it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimkv_cli.train.options import Border


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPass:
    """Say what one forward sees, and whether it is the student's.

    Several documents may share a row; none sees another. The student leaves each layer's `log_beta` `[B, Hkv, T]` in
    `log_betas`; it sees all tokens, fading, or with a border those before it.
    """

    positions: Tensor  # [B, T] int64, increasing within a document
    documents: Tensor  # [B, T] int64, −1 = padding
    gated: bool
    border: Border | None = None
    one_document: bool = False  # no row has more than one, so that order alone says what is visible
    log_betas: dict[int, Tensor] = field(default_factory=dict)

    def distances(self, queries: slice, keys: slice) -> Tensor:
        """Return how many positions each query is after each key: `[B, Tq, Tk]`, float32."""
        return (self.positions[:, queries, None] - self.positions[:, None, keys]).float()

    def visible(self, queries: slice, keys: slice, distances: Tensor, window: int | None) -> Tensor:
        """Return which keys each query may see: `[B, Tq, Tk]`."""
        index = torch.arange(self.positions.shape[1], device=self.positions.device)
        seen = index[queries, None] >= index[None, keys]
        seen = seen & (self.documents[:, queries, None] == self.documents[:, None, keys])
        return seen if window is None else seen & (distances < window)
