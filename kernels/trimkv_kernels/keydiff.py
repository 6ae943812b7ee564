"""KeyDiff's static scores (arXiv 2504.15364): how much a key differs from the mean of those that its head holds.

The mean moves with every token, so scores are computed anew from the keys before each eviction, and nothing has to be
kept for it: a step that is undone and made again comes out the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_kernels.reference import finite
from trimkv_kernels.slots import Slots


def key_scores(key: Tensor, alive: Tensor) -> Tensor:
    """Return −cos(k, a) `[…, N]` float32 for keys `[…, N, D]`, where a is the mean of the normalised `alive` ones.

    Where a key is not alive the result has no meaning; it has to be of numbers all the same, as 0 · NaN is NaN.
    """
    key = key.float()
    weights = torch.linalg.vector_norm(key, dim=-1).clamp_(min=_TINY).reciprocal_().masked_fill_(~alive, 0.0)
    mean = torch.matmul(weights[..., None, :], key)  # [..., 1, D], times their count
    products = torch.matmul(key, mean.transpose(-1, -2))[..., 0].mul_(weights)
    length = torch.linalg.vector_norm(mean, dim=-1).clamp_(min=_TINY)
    return finite(products.neg_().div_(length))


def compare_keys(
    key: Tensor,
    log_beta: Tensor,
    positions: Tensor,
    slots: Slots,
    *,
    rows: Tensor | None,
    fill: int,
    window: int | None,
) -> Tensor:
    """Score what the first `fill` slots hold, in place, and new tokens, before both are ranked; pins stay +inf.

    Args:
        key: `[B, Hkv, T, D]`, RoPE applied.
        log_beta: `[B, Hkv, T]` float32, +inf where a token is pinned.
        positions: `[B, T]` int32; −1 is padding, and a row with nothing else is left as it is.
        slots, rows: as `reference.prefill` takes them; without `rows` the first B.
        fill, window: as there.

    Returns:
        The scores of the new tokens, `[B, Hkv, T]` float32.
    """
    chosen = slice(key.shape[0]) if rows is None else rows
    held, pinned = slots.position[chosen, :, :fill], slots.log_beta[chosen, :, :fill]
    now = positions.amax(dim=1)[:, None, None]
    source = torch.cat([held, positions[:, None].expand(-1, key.shape[1], -1)], dim=2)
    keys = torch.cat([slots.key[chosen, :, :fill].to(key.dtype), key], dim=2)
    keys.masked_fill_((source < 0)[..., None], 0.0)
    scores = key_scores(keys, visible(source, now, window))
    stays = (pinned == torch.inf) | (held < 0) | (now < 0)
    slots.log_beta[chosen, :, :fill] = torch.where(stays, pinned, scores[..., : held.shape[2]])
    return torch.where(log_beta == torch.inf, log_beta, scores[..., held.shape[2] :])


def visible(held: Tensor, now: Tensor, window: int | None) -> Tensor:
    """Mark positions that hold a token which lies in the window of the one at `now`."""
    return held >= 0 if window is None else (held >= 0) & (held > now - window)


_TINY = 1e-12
