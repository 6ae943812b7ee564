"""What the model attends to and slots would have lost: a loss for each layer alone, without a student's forward.

The teacher's queries say how much of their attention falls on each token before them. Of that a head with M slots keeps
the share of the tokens before its border (`eviction.py`), and the loss is the negative logarithm of that share. It is
what the distribution over the kept tokens alone is away from the whole one: `KL(kept ‖ full) = −log share`. Nothing is
run but the teacher, and its gradient reaches the gates of all layers from every query, where distillation has to find
out through all later layers which head lost what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimkv_cli.train.attention import log_beta_of
from trimkv_cli.train.eviction import QUERY_BLOCK, above_border, lasting_of, log_ages_of, of_each_head, of_lasting
from trimkv_cli.train.training_pass import TeacherStates, TrainingPass

_LEAST_SHARE = 1e-6  # below, the loss rises no more steeply


def lost_attention(
    layers: TeacherStates,
    gates: Sequence[nn.Module],
    now: TrainingPass,
    weights: Tensor,
    windows: Sequence[int | None],
) -> Tensor:
    """Return `Σ weight · −log share` over the queries in `now.columns`, a mean over layers and query heads.

    `weights` `[B, Nq]`, 0 for padding; `now` has the border. Time is O(B · Hq · Nq · T) for each layer.
    """
    losses = []
    for index, (layer, gate) in enumerate(zip(sorted(layers.queries), gates, strict=True)):
        log_beta = log_beta_of(gate, layers.hidden[layer], now)
        query, key = layers.queries[layer].float(), layers.keys[layer].float()
        loss = _LostAttention.apply(lasting_of(log_beta), query, key, now, weights, windows[index])  # type: ignore[no-untyped-call]
        losses.append(loss / query.shape[1])
    return torch.stack(losses).mean()


class _LostAttention(torch.autograd.Function):
    """Sum over the queries `[B, Hq, Nq, D]` and find the gradient in `lasting` `[B, Hkv, T]` on the way."""

    @staticmethod
    def forward(
        ctx: Any, lasting: Tensor, query: Tensor, key: Tensor, now: TrainingPass, weights: Tensor, window: int | None
    ) -> Tensor:
        gradient, loss = torch.zeros_like(lasting), lasting.new_zeros(())
        grouped = query.view(query.shape[0], key.shape[1], -1, *query.shape[2:])
        for start in range(0, query.shape[2], QUERY_BLOCK):
            queries = slice(start, min(start + QUERY_BLOCK, query.shape[2]))
            keys = slice(0, now.reach(queries))
            lost, slope = _lost(
                lasting[:, :, keys],
                grouped[:, :, :, queries],
                key[:, :, keys],
                now,
                weights[:, queries],
                queries,
                window,
            )
            loss = loss + lost
            gradient[:, :, keys] += slope
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None, None, None


def _lost(
    lasting: Tensor,
    query: Tensor,
    key: Tensor,
    now: TrainingPass,
    weights: Tensor,
    queries: slice,
    window: int | None,
) -> tuple[Tensor, Tensor | float]:
    """Return the loss of a block of queries `[B, Hkv, G, n, D]`, and its gradient in `lasting` `[B, Hkv, Tk]`."""
    assert now.border is not None
    if key.shape[2] <= now.border.slots:  # all are kept
        return lasting.new_zeros(()), 0.0
    visible, log_ages = log_ages_of(now, queries, slice(0, key.shape[2]), window)
    above, neighbours = above_border(lasting[:, :, None] - log_ages, now.border)
    kept = above.sigmoid_()
    logits = of_each_head(query, key.mT).masked_fill_(~visible[:, None, None], -torch.inf)
    attention = logits.softmax(dim=4)
    share = (attention * kept[:, :, None]).sum(dim=4) + _LEAST_SHARE
    weight = weights[:, None, None]
    of_kept = attention.mul_((weight / share)[..., None]).sum(dim=2).neg_()
    of_above = of_kept.mul_(kept).mul_(1 - kept)
    return -(weight * share.log()).sum(), of_lasting(of_above, neighbours, now.border.sharpness)
