"""The memory that the operations work on: the slots of one layer, and what its last decode displaced."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EIGHT_BITS = torch.float8_e4m3fn


class Slots(NamedTuple):
    """Hold what one layer remembers, `M` slots for each (row, KV head).

    A slot is empty when its position is negative. The i-th slot starts as position −1 − i with log_beta −inf: its score
    is −inf, so it is the first to be taken, and the tie between empty slots fills them in order.

    What an empty slot holds has no weight, but is read: its value is a finite number (0 · NaN is NaN), as allocated,
    cleared or left by a token; its key may be anything.
    """

    key: Tensor  # [R, Hkv, M, D] cache dtype, RoPE applied
    value: Tensor  # [R, Hkv, M, D] cache dtype
    log_beta: Tensor  # [R, Hkv, M] float32; what fades is ≤ 0, a static score any number
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
        made._empty()
        return made

    def clear(self) -> None:
        """Empty every slot, in place; values are zero, as those of an earlier sequence need not be numbers."""
        self.value.zero_()
        self._empty()

    def _empty(self) -> None:
        count = self.position.shape[-1]
        self.log_beta.fill_(-torch.inf)
        self.position.copy_(-1 - torch.arange(count, dtype=torch.int32, device=self.position.device))

    def rows(self, first: int, count: int) -> Slots:
        """Return a view of `count` rows from `first` on."""
        return Slots(*(tensor.narrow(0, first, count) for tensor in self))

    def head(self, count: int) -> Slots:
        """Return a view of the first `count` slots of every head."""
        return Slots(*(tensor.narrow(2, 0, count) for tensor in self))

    def taken(self, index: Tensor) -> Slots:
        """Return a copy of the slots at `index` `[R, Hkv, N]` only."""
        return Slots(*(_take(tensor, index) for tensor in self))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)


def _take(tensor: Tensor, index: Tensor) -> Tensor:
    wide = index[..., None].expand(*index.shape, tensor.shape[3]) if tensor.dim() == 4 else index
    return as_bytes(tensor).gather(2, wide).view(tensor.dtype)


def as_bytes(tensor: Tensor) -> Tensor:
    """Return a view for what torch does with no 8-bit floats, such as gather and scatter; others as they are."""
    return tensor.view(torch.uint8) if tensor.dtype is EIGHT_BITS else tensor


def narrowed(new: Tensor, dtype: torch.dtype) -> Tensor:
    """Return new keys or values as slots hold them: 8 bits hold no infinity, and numbers only up to 448."""
    if dtype is EIGHT_BITS:
        most = torch.finfo(dtype).max
        new = new.clamp(-most, most)
    return new.to(dtype)


class Journal(NamedTuple):
    """Hold the one slot for each (row, KV head) that the last decode of one layer overwrote, as it was before.

    A row or head where no token entered has some slot here, too: `undo` leaves it alone.
    """

    key: Tensor  # [R, Hkv, D] cache dtype
    value: Tensor  # [R, Hkv, D] cache dtype
    log_beta: Tensor  # [R, Hkv] float32
    position: Tensor  # [R, Hkv] int32
    slot: Tensor  # [R, Hkv] int64

    @classmethod
    def beside(cls, slots: Slots) -> Journal:
        """Allocate a journal for decodes into `slots`; it grows as little as they do."""
        key, value, log_beta, position = (torch.zeros_like(tensor[:, :, 0]) for tensor in slots)
        slot = torch.zeros_like(position, dtype=torch.int64)
        return cls(key=key, value=value, log_beta=log_beta, position=position, slot=slot)

    def rows(self, first: int, count: int) -> Journal:
        """Return a view of `count` rows from `first` on."""
        return Journal(*(tensor.narrow(0, first, count) for tensor in self))

    def undo(self, position: Tensor, slots: Slots) -> None:
        """Take the token at `position` `[B]` int32 out of the first B rows again; −1 leaves a row as it is.

        `slots` is changed in place, and only where the slot named here holds that position: heads that the token never
        entered, or that a failed step never reached, stay as they are.
        """
        count = position.shape[0]
        journal, held = self.rows(0, count), slots.rows(0, count)
        index = journal.slot[..., None]
        now = position[:, None, None]
        entered = (now >= 0) & (held.position.gather(2, index) == now)
        for target, old in zip(held, journal, strict=False):
            wide = index[..., None].expand(-1, -1, -1, target.shape[3]) if target.dim() == 4 else index
            here = entered[..., None] if target.dim() == 4 else entered
            target, old = as_bytes(target), as_bytes(old)  # noqa: PLW2901  # views of the same
            target.scatter_(2, wide, torch.where(here, old[:, :, None], target.gather(2, wide)))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self)


class LayerTable(NamedTuple):
    """Slots and journals of all layers, and `addresses` `[L, 10]` int64: where their tensors begin, and the sizes.

    The addresses hold as long as nobody allocates slots anew.
    """

    slots: tuple[Slots, ...]
    journals: tuple[Journal, ...]
    addresses: Tensor

    @classmethod
    def of(cls, layers: list[tuple[Slots, Journal]]) -> LayerTable:
        """List the memory of layers; all tensors are contiguous, and of the same dtypes, rows, heads and widths."""
        rows = [
            [*(tensor.data_ptr() for tensor in (*slots, *journal)), slots.position.shape[2]]
            for slots, journal in layers
        ]
        addresses = torch.tensor(rows, dtype=torch.int64).to(layers[0][0].position.device)
        slots, journals = zip(*layers, strict=True)
        return cls(slots, journals, addresses)

    def undo(self, position: Tensor) -> None:
        """Take the token at `position` `[B]` int32 out of all layers again, as `Journal.undo` does."""
        for slots, journal in zip(self.slots, self.journals, strict=True):
            journal.undo(position, slots)

    def clear(self, row: int) -> None:
        """Empty a row in all layers."""
        for slots in self.slots:
            slots.rows(row, 1).clear()
