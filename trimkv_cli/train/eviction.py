"""The student's attention under eviction: a query sees the tokens that M slots would hold, with a soft border.

The bias of arXiv 2512.03324 (equation 3) trains what fades; this trains what runs: at every step a head holds the M
tokens with the highest score `(t − i) · log_beta_i`. On a logarithmic scale a score is `lasting_i − log(age)`, where
`lasting_i = −log(−log_beta_i)`, and the border runs between the M-th and the next one. A sigmoid around it lets
the gates learn which tokens should have crossed. Only the order counts there, so a gate learns as fast
which tokens must outlive 50,000 others as which are of use for ten steps.

The student is its answers alone. What they attend to is what the teacher has read, so that a step costs little more
than that reading, and long sequences, in which much competes for few slots, can be afforded.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trimkv_cli.train.options import Border
from trimkv_cli.train.training_pass import TrainingPass, in_query_blocks

QUERY_BLOCK = 64  # queries that attend at a time: what is made of them stays in a core's cache
KEPT_NUMEL = 1 << 24  # pairs of tokens and heads, at most, whose weights (64 MiB) a layer keeps for the backward pass
_LEAST_FADING = 1e-30  # less has no gradient
_FAR = 1e4  # the log age of what is not there


def attend_to_kept(
    query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor, now: TrainingPass, window: int | None
) -> Tensor:
    """Attend to what lies before the pass's border; differentiable in the query and `log_beta` `[B, Hkv, T]`.

    Query `[B, Hq, Tq, D]`, scaled, key and value `[B, Hkv, T, D]`, all float32 → `[B, Hq, Tq, D]`. A query's own token
    competes like the others. Each step judges all tokens before it anew, so one that was evicted may come back, which
    is kinder than a cache. Time is O(B · Hq · Tq · T), and a search for the border per query and KV head. Where that is
    much it is done twice, so that memory is O(B · Hq · T).
    """
    keep = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] <= KEPT_NUMEL
    lasting = lasting_of(log_beta)
    attend_block = partial(_attend_block, now=now, window=window)
    return in_query_blocks(attend_block, query, key, value, lasting, size=QUERY_BLOCK, keep=keep, reach=now.reach)


def lasting_of(log_beta: Tensor) -> Tensor:
    """Return how long tokens last, on a logarithmic scale."""
    return -torch.log(-log_beta.clamp(max=-_LEAST_FADING))


def log_ages_of(now: TrainingPass, queries: slice, keys: slice, window: int | None) -> tuple[Tensor, Tensor]:
    """Return which keys the queries may see, `[B, Tq, Tk]`, and the logarithm of their ages, `[B, 1, Tq, Tk]`."""
    distances = now.distances(queries, keys)
    visible = now.visible(queries, keys, distances, window)
    return visible, torch.log(distances.clamp(min=0) + 2).masked_fill(~visible, _FAR)[:, None]


def _attend_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lasting: Tensor,
    *,
    now: TrainingPass,
    queries: slice,
    window: int | None,
) -> Tensor:
    assert now.border is not None
    keys = slice(0, key.shape[2])
    visible, log_ages = log_ages_of(now, queries, keys, window)
    batch, _, length, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, length, width)  # query heads by the KV head that they share
    if key.shape[2] <= now.border.slots:  # all are kept
        output = functional.scaled_dot_product_attention(
            grouped, key[:, :, None], value[:, :, None], attn_mask=visible[:, None, None], scale=1.0
        )
    else:
        output = _SoftBorder.apply(grouped, key, value, lasting, log_ages, now.border)  # type: ignore[no-untyped-call]
    return output.flatten(1, 2)


class _SoftBorder(torch.autograd.Function):
    """Attend with the logarithm of how far each key is kept as a bias: 0 well above the border, −∞ well below.

    Query `[B, Hkv, G, Tq, D]`, lasting `[B, Hkv, Tk]`, log ages `[B, 1, Tq, Tk]` → `[B, Hkv, G, Tq, D]`. Keys and
    values are the teacher's and get no gradient. What autograd would make of the same steps takes twice as long.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lasting: Tensor, log_ages: Tensor, border: Border
    ) -> Tensor:
        scores = lasting[:, :, None] - log_ages
        above, neighbours = above_border(scores, border)
        logits = of_each_head(query, key.mT)
        weights = logits.add_(functional.logsigmoid(above)[:, :, None]).softmax(dim=4)
        output = of_each_head(weights, value)
        ctx.save_for_backward(key, value, weights, output, above.sigmoid_(), neighbours)
        ctx.sharpness = border.sharpness
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        key, value, weights, output, kept, neighbours = ctx.saved_tensors
        mean = (grads[0] * output).sum(dim=4, keepdim=True)
        of_logits = of_each_head(grads[0], value.mT).sub_(mean).mul_(weights)
        of_above = of_logits.sum(dim=2).mul_(1 - kept)
        return of_each_head(of_logits, key), None, None, of_lasting(of_above, neighbours, ctx.sharpness), None, None


def of_each_head(many: Tensor, one: Tensor) -> Tensor:
    """Multiply `[B, Hkv, G, Tq, x]` by what a KV head's query heads share, `[B, Hkv, x, y]`, without copies of it."""
    product = many.flatten(2, 3) @ one
    return product.view(*many.shape[:4], one.shape[3])


def above_border(scores: Tensor, border: Border) -> tuple[Tensor, Tensor]:
    """Return how sharply scores `[B, Hkv, Tq, Tk]`, which it overwrites, lie above their border; and neighbours."""
    neighbours = _border_neighbours(scores, border.slots)
    level = scores.gather(3, neighbours).mean(dim=3, keepdim=True).clamp(min=-_FAR / 2)
    return scores.sub_(level).mul_(border.sharpness), neighbours


def of_lasting(of_above: Tensor, neighbours: Tensor, sharpness: float) -> Tensor:
    """Return the gradient in `lasting` `[B, Hkv, Tk]` for one in what `above_border` returned, which it overwrites."""
    of_scores = of_above.mul_(sharpness)
    of_level = of_scores.sum(dim=3, keepdim=True) / -2  # half of it is each neighbour's
    return of_scores.scatter_add_(3, neighbours, of_level.expand_as(neighbours)).sum(dim=2)


def _border_neighbours(scores: Tensor, slots: int) -> Tensor:
    """Return where the border's neighbours are, the best that is evicted and the worst that is kept: `[…, 2]`."""
    if scores.device.type != "cpu":
        return scores.topk(slots + 1, dim=3).indices[..., -2:]
    first = scores.shape[3] - slots - 1  # NumPy's partition is vectorised, topk is not: a third of its time
    largest = torch.from_numpy(np.argpartition(scores.numpy(), first, axis=3)[..., first:])
    evicted, kept = largest[..., :1], largest[..., 1:]
    worst = scores.gather(3, kept).argmin(dim=3, keepdim=True)
    return torch.cat([evicted, kept.gather(3, worst)], dim=3)
