"""New positions for what a row keeps when the model's are used up: ranks 0…fill − 1, in the order they had.

Kept keys are rotated by the difference, so that distances between tokens that stay close are as they were and the text
can go on at position `fill`. Scores go on using the original positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimkv_cli.cache.releases import rotary_embedding
from trimkv_cli.errors import DoesNotFit, UnsupportedModel
from trimkv_cli.plan.run import Run
from trimkv_kernels import Slots

_EMPTY_LAST = torch.iinfo(torch.int32).max


class RebasedRow(NamedTuple):
    """Where one row stands: what is taken off its positions, since when, and the ranks given then, per layer."""

    offset: int
    since: int
    ranks: tuple[Tensor, ...]  # [1, Hkv, M] int32


class Rebase:
    """Own the positions of the rows of one cache, as the model sees them; 4 bytes per slot.

    A token fed after the row's last rebase stands at its original position less `offset`; one kept from before has the
    rank it was given then.
    """

    def __init__(self, slots: Sequence[Slots], *, limit: int, inv_freq: Tensor) -> None:
        self._slots = slots
        self._limit = limit
        self._inv_freq = inv_freq.float()  # [rotary_dim / 2]
        self._ranks = [torch.zeros_like(layer.position) for layer in slots]
        rows = slots[0].position.shape[0]
        self._offset, self._since = [0] * rows, [0] * rows
        self._offsets = torch.zeros(rows, dtype=torch.int64, device=slots[0].position.device)  # the same, there

    @property
    def nbytes(self) -> int:
        return sum(ranks.nbytes for ranks in self._ranks)

    def model_positions(self, positions: Tensor, rows: Tensor | None) -> Tensor:
        """Return where tokens at original positions `[B, T]` stand for the model; `rows` is None for the first B."""
        offsets = self._offsets[: positions.shape[0]] if rows is None else self._offsets[rows]
        return (positions - offsets[:, None]).clamp(min=0)

    def is_full(self, row: int, *, seen: int, tokens: int) -> bool:
        """Say whether the next `tokens` of `row` would pass the model's positions."""
        return seen - self._offset[row] + tokens > self._limit

    @torch.inference_mode()
    def make_room(self, row: int, *, seen: int, tokens: int) -> None:
        """Renumber what `row` keeps if the next `tokens` would pass the model's positions."""
        if not self.is_full(row, seen=seen, tokens=tokens):
            return
        fill = 0
        for layer, ranks in zip(self._slots, self._ranks, strict=True):
            fill = self._renumber(layer, ranks, row, min(seen, layer.position.shape[2]))
        self._set(row, offset=seen - fill, since=seen)

    def clear(self, row: int) -> None:
        """Start a new sequence in `row`."""
        self._set(row, offset=0, since=0)

    def copy(self, source: int, target: int) -> None:
        """Let `target` stand where `source` does."""
        saved = self.save(source)
        if saved is None:
            self.clear(target)
        else:
            self.load(target, saved)

    def save(self, row: int) -> RebasedRow | None:
        """Copy where `row` stands to host memory; None while it stands at its own positions."""
        if not self._offset[row]:
            return None
        ranks = tuple(layer[row : row + 1].to("cpu", copy=True) for layer in self._ranks)
        return RebasedRow(self._offset[row], self._since[row], ranks)

    def load(self, row: int, saved: RebasedRow) -> None:
        """Let `row` stand where `save` found one."""
        self._set(row, offset=saved.offset, since=saved.since)
        for ranks, copied in zip(self._ranks, saved.ranks, strict=True):
            ranks[row : row + 1].copy_(copied)

    def _set(self, row: int, *, offset: int, since: int) -> None:
        self._offset[row], self._since[row] = offset, since
        self._offsets[row] = offset

    def _renumber(self, layer: Slots, ranks: Tensor, row: int, fill: int) -> int:
        """Give the slots in use of one layer's row their ranks, and rotate their keys; return how many they are."""
        position, key = layer.position[row, :, :fill], layer.key[row, :, :fill]  # [Hkv, fill], [Hkv, fill, D]
        stood = torch.where(position >= self._since[row], position - self._offset[row], ranks[row, :, :fill])
        order = torch.where(position >= 0, position, _EMPTY_LAST).argsort(dim=1)
        count = torch.arange(fill, dtype=torch.int32, device=position.device).expand_as(position)
        new = torch.empty_like(position).scatter_(1, order, count)
        key.copy_(rotate(key, new - stood, self._inv_freq))
        ranks[row, :, :fill] = new
        return fill


def rotate(key: Tensor, by: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotate keys `[…, D]` that carry RoPE by more positions, `[…]`; what lies beyond the rotated dimensions stays."""
    half = inv_freq.shape[0]
    angle = by[..., None].float() * inv_freq.to(by.device)
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = key[..., :half].float(), key[..., half : 2 * half].float(), key[..., 2 * half :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.to(key.dtype), rest], dim=-1)


def make_rebase(model: Any, slots: Sequence[Slots], *, run: Run, positions: int) -> Rebase:
    """Make what renumbers the rows of a cache with these slots.

    Raises:
        UnsupportedModel: sliding windows, or RoPE whose angles depend on the length.
        DoesNotFit: what is kept and one chunk take more positions than there are.
    """
    rope_type = str((getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default"))
    _check(run, rope_type, positions)
    return Rebase(slots, limit=positions, inv_freq=rotary_embedding(model).inv_freq)


def _check(run: Run, rope_type: str, positions: int) -> None:
    if any(window is not None for window in run.spec.windows):
        raise UnsupportedModel("--on-overflow rebase does not know sliding windows", hint="--on-overflow error")
    if rope_type in ("longrope", "su", "dynamic"):
        raise UnsupportedModel(
            f"--on-overflow rebase needs RoPE that stays as it is; this model's is {rope_type}",
            hint="--on-overflow error",
        )
    if run.prefill_chunk == 0:
        raise DoesNotFit(
            "--on-overflow rebase reads in chunks, and --prefill-chunk 0 is none", hint="--prefill-chunk 512"
        )
    if run.kv_budget + run.prefill_chunk > positions:
        raise DoesNotFit(
            f"{run.kv_budget} slots and a chunk of {run.prefill_chunk} take more than the {positions} positions",
            hint="a smaller --kv-budget or --prefill-chunk",
        )
