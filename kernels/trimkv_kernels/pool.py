"""Slots of all layers of one size together, for decode on a CPU, where a step costs the number of its operations.

The slots of these layers lie in one allocation, with one place more per head. A token enters that place, attention
reads all places as they lie, and after the last layer one eviction for all layers swaps the place with the loser's
slot. So the place holds what the step displaced: it is the journal. `reference.decode` says what comes out of it.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from trimkv_kernels.keydiff import key_scores, visible
from trimkv_kernels.reference import protected
from trimkv_kernels.slots import Journal, Slots

_NEVER = torch.iinfo(torch.int32).min


class SlotPool:
    """Own the slots of `layers` layers that have the same number of them and the same window."""

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        num_kv_heads: int,
        slots: int,
        head_dim: int,
        window: int | None,
        recent: int = 0,
        static: bool = False,
        compares_keys: bool = False,
        dtype: torch.dtype,
    ) -> None:
        shape = (layers, rows, num_kv_heads, slots + 1)
        self.window = window
        self.recent = recent  # the newest tokens of a row that are pinned
        self.static = static  # log_beta is the score
        self.compares_keys = compares_keys  # which is found from all keys before each eviction
        self.size = slots
        self.key = torch.zeros(*shape, head_dim, dtype=dtype)
        self.value = torch.zeros(*shape, head_dim, dtype=dtype)
        self.log_beta = torch.zeros(shape, dtype=torch.float32)
        self.position = torch.zeros(shape, dtype=torch.int32)
        self.slot = torch.zeros(shape[:3], dtype=torch.int64)
        heads = layers * rows * num_kv_heads
        self._first = torch.arange(heads).view(shape[:3]) * (slots + 1)  # where a head's slots begin
        self._nothing = torch.zeros(1, 1, 1, dtype=dtype)
        self.clear(slice(None))

    def clear(self, row: int | slice) -> None:
        """Forget everything in a row, in place; what its slots held is gone, as a NaN there would poison every sum."""
        for tensor in (self.key, self.value):
            tensor[:, row].zero_()
        self.log_beta[:, row].fill_(-torch.inf)
        self.position[:, row].copy_(-1 - torch.arange(self.size + 1, dtype=torch.int32))

    def resizing(self, keep: Tensor, slots: int) -> Callable[[], None]:
        """Return what gives every head `slots` slots: those that `keep` `[L, R, Hkv, ≤ slots]` names, then empty ones.

        Fewer slots move where they lie, layer by layer, and all that this allocates is there when it is returned. For
        more one tensor is replaced after the other, so that only one is there twice.
        """
        return self._shrinking(keep, slots) if slots < self.size else partial(self._grow, keep, slots)

    def _shrinking(self, keep: Tensor, slots: int) -> Callable[[], None]:
        aside = [tensor.new_empty((*keep.shape[1:], *tensor.shape[4:])) for tensor in self._tensors]
        first = torch.arange(self.slot.numel()).view(self.slot.shape) * (slots + 1)

        def shrink() -> None:
            for (name, empty), buffer in zip(self._empty(slots).items(), aside, strict=True):
                setattr(self, name, _shrunk(getattr(self, name), keep, buffer, empty))
            self._set_size(slots, first)

        return shrink

    def _grow(self, keep: Tensor, slots: int) -> None:
        first = torch.arange(self.slot.numel()).view(self.slot.shape) * (slots + 1)
        for name, empty in self._empty(slots).items():
            old: Tensor = getattr(self, name)
            made = old.new_full((*old.shape[:3], slots + 1, *old.shape[4:]), empty)
            if name == "position":
                made.copy_(-1 - torch.arange(slots + 1, dtype=torch.int32))
            made[:, :, :, : keep.shape[3]] = old.gather(3, _index(keep, old))
            setattr(self, name, made)
        self._set_size(slots, first)

    @staticmethod
    def _empty(slots: int) -> dict[str, float]:
        """Return, by tensor, what a place without a token holds, of positions the last place."""
        return {"key": 0.0, "value": 0.0, "log_beta": -torch.inf, "position": -1 - slots}

    def _set_size(self, slots: int, first: Tensor) -> None:
        self._first = first
        self.slot.zero_()
        self.size = slots

    def slots(self, layer: int) -> Slots:
        """Return the slots of one layer, as a view."""
        return Slots(*(tensor[layer, :, :, : self.size] for tensor in self._tensors))

    def journal(self, layer: int) -> Journal:
        """Return the places behind the slots of one layer, as a view."""
        key, value, log_beta, position = (tensor[layer, :, :, self.size] for tensor in self._tensors)
        return Journal(key, value, log_beta, position, self.slot[layer])

    def begin(self, position: Tensor, *, dense: bool) -> Tensor | None:
        """Say at which `position` `[B]` int32 the tokens of a step enter, −1 for none.

        Returns:
            What `attend` adds to logits, `[L, B, Hkv, M + 1]`: −inf for places that hold nothing to see. None when
            `dense`: every row with a token has all its slots in use.
        """
        held = self.position[:, : len(position)]
        held[..., self.size] = position.clamp(min=0)[None, :, None]
        if dense and self.window is None:
            return None
        dead = held < 0
        if self.window is not None:
            dead = dead | (held <= (position - self.window)[None, :, None, None])
        return torch.zeros(dead.shape, dtype=self.key.dtype).masked_fill_(dead, -torch.inf)

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """What is attended to, `[L, R, Hkv, M + 1, D]` keys and values: a graph of a step is given them as they are."""
        return self.key, self.value

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        *,
        held: tuple[Tensor, Tensor],
        scale: float,
    ) -> Tensor:
        """Feed a token per row to one layer, and attend from it: query `[B, Hq, D]`, key and value `[B, Hkv, D]`.

        Returns:
            `[B, Hq, D]`.
        """
        rows, heads, head_dim = key.shape
        keys, values = (tensor[layer, :rows] for tensor in held)
        keys[:, :, -1].copy_(key)
        values[:, :, -1].copy_(value)
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        added, weight = (self._nothing, 0.0) if bias is None else (bias[layer].view(rows * heads, 1, -1), 1.0)
        grouped = query.reshape(rows * heads, -1, head_dim)
        logits = torch.baddbmm(added, grouped, keys.transpose(1, 2), beta=weight, alpha=scale)
        return torch.bmm(logits.softmax(-1), values).view(query.shape)

    def evict(self, log_beta: Tensor, position: Tensor, spans: Tensor | None = None) -> None:
        """Keep the best M of the M + 1 tokens of every head, in place; `log_beta` `[L, B, Hkv]` of the new ones.

        Those at positions in `spans` `[B, 2, 2]` int32 are protected, as `reference.decode` says.
        """
        rows = len(position)
        held, log_betas = self.position[:, :rows], self.log_beta[:, :rows]
        idle = (position < 0)[None, :, None]
        # A row without a token loses what it was fed: its score is −inf, at a newer position than any empty slot has.
        log_betas[..., -1] = log_beta.masked_fill(idle, -torch.inf)
        if self.compares_keys:
            self._compare_keys(position)
        scores = _scores(log_betas, held, position, self.window, self.recent, static=self.static, spans=spans)
        lowest = scores.amin(dim=-1, keepdim=True)
        loser = held.masked_fill(scores > lowest, _NEVER).argmax(dim=-1)  # ties: the newest goes
        _swap(self._tensors, self.slot, self._first, loser)

    def undo(self, position: Tensor) -> None:
        """Take the token at `position` `[B]` int32 out of all layers again, as `Journal.undo` does."""
        first = self._first[:, : len(position)]
        at, here = (first + self.slot[:, : len(position)]).flatten(), first.flatten() + self.size
        now = position[None, :, None].expand(first.shape).flatten()
        entered = (now >= 0) & (_flat(self.position).index_select(0, at) == now)
        at, here = at[entered], here[entered]
        for tensor in map(_flat, self._tensors):
            tensor.index_copy_(0, at, tensor.index_select(0, here))

    def _compare_keys(self, position: Tensor) -> None:
        """Do what `keydiff.compare_keys` does, for all layers together where the keys need no copy for it."""
        rows, now = len(position), position[:, None, None]
        whole = rows == self.key.shape[1]
        for layer in (slice(None),) if whole else range(len(self.key)):
            held, log_beta = self.position[layer, ..., :rows, :, :], self.log_beta[layer, ..., :rows, :, :]
            scores = key_scores(self.key[layer, ..., :rows, :, :, :], visible(held, now, self.window))
            log_beta.copy_(torch.where(log_beta.isinf() | (now < 0), log_beta, scores))

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.key, self.value, self.log_beta, self.position


def _scores(
    log_beta: Tensor,
    held: Tensor,
    position: Tensor,
    window: int | None,
    recent: int,
    *,
    static: bool,
    spans: Tensor | None,
) -> Tensor:
    """Return what `reference` ranks by, `[L, B, Hkv, M + 1]`, where rows without a token, too, lose their new one."""
    now = position[None, :, None, None]
    # Of a row without a token a pinned slot stays +inf.
    scores = log_beta if static else log_beta * (now + 2 - held).clamp(min=1)
    if recent:
        newest = (position - recent).clamp(min=-1).masked_fill(position < 0, -_NEVER - 1)
        scores = scores.masked_fill(held > newest[None, :, None, None], torch.inf)
    if spans is not None:
        scores = scores.masked_fill(protected(held, spans) & (now >= 0), torch.inf)
    return scores if window is None else scores.masked_fill(held <= now - window, -torch.inf)


def _swap(tensors: tuple[Tensor, ...], slot: Tensor, first: Tensor, loser: Tensor) -> None:
    """Exchange the places of new tokens with the slots of the losers `[L, B, Hkv]`, in place."""
    rows, size = loser.shape[1], tensors[0].shape[3] - 1
    # What loses at once stays where it is: no slot then holds its position, and an undo finds nothing to do.
    slot[:, :rows] = loser.clamp(max=size - 1)
    at, here = (first[:, :rows] + loser).flatten(), first[:, :rows].flatten() + size
    # Everything is allocated before anything changes: a swap cannot be left half done.
    flats = [_flat(tensor) for tensor in tensors]
    swaps = [(flat.index_select(0, at), flat.index_select(0, here)) for flat in flats]
    for flat, (lost, entering) in zip(flats, swaps, strict=True):
        flat.index_copy_(0, at, entering)
        flat.index_copy_(0, here, lost)


def _shrunk(old: Tensor, keep: Tensor, aside: Tensor, empty: float) -> Tensor:
    """Move what `keep` names to the front of a tensor `[L, R, Hkv, M + 1, …]`, and return that part of it.

    A layer's new places end no later than its old ones, so that it overwrites itself and layers that have moved.
    """
    shape = (*keep.shape[:3], keep.shape[3] + 1, *old.shape[4:])
    new = old.view(-1)[: math.prod(shape)].view(shape)
    for layer, index in enumerate(keep):
        torch.gather(old[layer], 2, _index(index, old[layer]), out=aside)
        new[layer, :, :, :-1].copy_(aside)
        new[layer, :, :, -1].fill_(empty)
    _give_back(old, new.nbytes)
    return new


def _give_back(tensor: Tensor, used: int) -> None:
    """Give the memory of a tensor behind its first `used` bytes back to the system."""
    if sys.platform == "linux":
        page, start = mmap.PAGESIZE, tensor.data_ptr()
        first, end = -(-(start + used) // page) * page, (start + tensor.nbytes) // page * page
        advise = getattr(ctypes.CDLL(None), "madvise", None)
        if end <= first or (advise is not None and not advise(_pointer(first), _size(end - first), mmap.MADV_DONTNEED)):
            return
    tensor.untyped_storage().resize_(int(tensor.storage_offset()) * tensor.element_size() + used)  # a copy


_pointer, _size = ctypes.c_void_p, ctypes.c_size_t


def _index(keep: Tensor, tensor: Tensor) -> Tensor:
    """Return `keep` `[…, M]` as an index into a tensor `[…, M']` or `[…, M', D]`."""
    return keep[..., None].expand(*keep.shape, tensor.shape[-1]) if tensor.dim() > keep.dim() else keep


def _flat(tensor: Tensor) -> Tensor:
    """Return all slots of all heads in one dimension."""
    return tensor.view(-1, *tensor.shape[4:])
