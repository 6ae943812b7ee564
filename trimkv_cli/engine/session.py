"""What a finished request left in its row, kept aside: to undo a turn, to fork a conversation, to save a read."""

from __future__ import annotations

from dataclasses import dataclass

from trimkv_cli.cache.rebase import RebasedRow
from trimkv_kernels import Slots


@dataclass(frozen=True, slots=True, kw_only=True)
class RowState:
    """One row of the cache between two requests, in host memory whatever the device.

    The token ids are the sampler's state too: every request starts its counts and steps anew from them.
    """

    layers: tuple[Slots, ...]  # [1, Hkv, slots in use, …] each
    token_ids: tuple[int, ...]  # fed to the row so far
    unread: tuple[int, ...]  # prompt tokens that a stopped request had not read
    last_token: int | None  # generated, not yet fed
    long_rope: bool
    rebased: RebasedRow | None = None

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)
