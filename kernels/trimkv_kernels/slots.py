"""The memory that the operations work on: the slots of one layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Slots(NamedTuple):
    """Hold what one layer remembers, `M` slots for each (row, KV head).

    A slot is empty when its position is negative. The i-th slot starts as position −1 − i with log_beta −inf: its score
    is −inf, so it is the first to be taken, and the tie between empty slots fills them in order.
    """

    key: Tensor  # [R, Hkv, M, D] cache dtype, RoPE applied
    value: Tensor  # [R, Hkv, M, D] cache dtype
    log_beta: Tensor  # [R, Hkv, M] float32, ≤ 0
    position: Tensor  # [R, Hkv, M] int32

    @classmethod
    def empty(
        cls, *, rows: int, num_kv_heads: int, slots: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Slots:
        """Allocate empty slots; nothing grows after this."""
        shape = (rows, num_kv_heads, slots)
        made = cls(
            key=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
            value=torch.zeros(*shape, head_dim, dtype=dtype, device=device),
            log_beta=torch.empty(shape, dtype=torch.float32, device=device),
            position=torch.empty(shape, dtype=torch.int32, device=device),
        )
        made.clear()
        return made

    def clear(self) -> None:
        """Empty every slot, in place."""
        count = self.position.shape[-1]
        self.log_beta.fill_(-torch.inf)
        self.position.copy_(-1 - torch.arange(count, dtype=torch.int32, device=self.position.device))

    def rows(self, first: int, count: int) -> Slots:
        """Return a view of `count` rows from `first` on."""
        return Slots(*(tensor.narrow(0, first, count) for tensor in self))

    def head(self, count: int) -> Slots:
        """Return a view of the first `count` slots of every head."""
        return Slots(*(tensor.narrow(2, 0, count) for tensor in self))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)
