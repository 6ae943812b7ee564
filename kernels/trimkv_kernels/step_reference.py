"""The operations of a whole decode step in plain torch: what every kernel of `step` must equal.

Between two matrix products of a layer stands one of these each. Numbers are float32 inside, and rounded to the dtype of
the model once, where they leave.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_kernels import reference
from trimkv_kernels.slots import LayerTable, Slots


class Norm(NamedTuple):
    """What divides by the root of the mean square and multiplies by `weight` `[N]` + `offset` (Gemma's is 1)."""

    weight: Tensor
    eps: float
    offset: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x` `[…, N]` in float32, normed."""
        x = x.float()
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.weight.float() + self.offset)


def add_norm(
    residual: Tensor, added: Tensor | None, norm: Norm, *, before: Norm | None = None, out: Tensor | None = None
) -> Tensor:
    """Add to the residual stream, in place, and return it normed.

    Args:
        residual: `[B, N]`, changed in place.
        added: `[B, N]` of the same dtype, normed by `before` where there is one (Gemma); None adds nothing.
        norm: of the sum, as the stream holds it.
        out: `[B, N]` contiguous, where the result is written; a new tensor without.
    """
    if added is not None:
        new = added if before is None else before(added).to(residual.dtype)
        residual.copy_(residual.float() + new.float())
    normed = norm(residual).to(residual.dtype)
    return normed if out is None else out.copy_(normed)


def rotate(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    key: Tensor,
    value: Tensor,
    query_norm: Norm | None = None,
    key_norm: Norm | None = None,
) -> Tensor:
    """Split a product into heads, norm and rotate queries and keys.

    Args:
        qkv: `[B, (Hq + 2 · Hkv) · D]`: queries, keys, values.
        cos, sin: `[B, D]` float32; x · cos + roll(x, D / 2) · sin rotates x, so the first half of sin is negative.
        key, value: `[B, Hkv, D]` contiguous, written here.
        query_norm, key_norm: of each head; both or neither.

    Returns:
        The queries, `[B, Hq, D]`.
    """
    num_kv_heads, dim = key.shape[1:]
    heads = qkv.view(len(qkv), -1, dim)
    counts = [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads]
    queries, keys, values = torch.split(heads, counts, dim=1)

    def turned(x: Tensor, norm: Norm | None) -> Tensor:
        x = x.float() if norm is None else norm(x)
        return x * cos[:, None] + x.roll(dim // 2, dims=-1) * sin[:, None]

    key.copy_(turned(keys, key_norm))
    value.copy_(values)
    return turned(queries, query_norm).to(qkv.dtype)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    slots: Slots,
    *,
    lowest: Tensor | None = None,
    loser: Tensor | None = None,
    scale: float,
    window: int | None,
    recent: int = 0,
    static: bool = False,
    spans: Tensor | None = None,
) -> Tensor:
    """Attend as `reference.decode` does, over all slots, and find who would lose its slot; nothing is evicted.

    Args:
        lowest, loser: `[B, Hkv]` float32 and int32, written here: the lowest score of each head's slots, and the slot
            that has it. Of a row without a token they have no meaning. Without them nothing is scored.
    """
    rows = slots.rows(0, len(query))
    output = reference.attend_one(query, key, value, position, rows, dense=False, scale=scale, window=window)
    if lowest is not None and loser is not None:
        ranks: dict[str, Any] = {"window": window, "recent": recent, "static": static, "spans": spans}
        found_lowest, found_loser = reference.find_loser(position, rows, **ranks)
        lowest.copy_(found_lowest)
        loser.copy_(found_loser)
    return output


def activate(gate_up: Tensor, kind: str) -> Tensor:
    """Return the activation of the first half of `[B, 2 · N]` times the second; `kind` is silu or gelu_tanh."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    active = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh")
    return (active * up).to(gate_up.dtype)


def evict(
    keys: Tensor,
    values: Tensor,
    log_beta: Tensor,
    position: Tensor,
    table: LayerTable,
    *,
    lowest: Tensor,
    loser: Tensor,
    recent: int = 0,
    static: bool = False,
    spans: Tensor | None = None,
) -> None:
    """Do the other half of a decode in all layers: keep the best M of M + 1 tokens of each head, in place.

    Args:
        keys, values: `[L, B, Hkv, D]` of the new tokens, contiguous.
        log_beta: `[L, B, Hkv]` float32.
        position: `[B]` int32.
        table: slots and journals, changed in place.
        lowest, loser: `[L, B, Hkv]`, as `attend` found them.
    """
    ranks: dict[str, Any] = {"recent": recent, "static": static, "spans": spans}
    for layer, (slots, journal) in enumerate(zip(table.slots, table.journals, strict=True)):
        new = keys[layer], values[layer], log_beta[layer], position
        rows = slots.rows(0, len(position)), journal.rows(0, len(position))
        reference.enter(*new, *rows, lowest=lowest[layer], loser=loser[layer], **ranks)
