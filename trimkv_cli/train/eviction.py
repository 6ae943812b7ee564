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

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trimkv_cli.train.options import Border
from trimkv_cli.train.recompute import in_query_blocks
from trimkv_cli.train.training_pass import TrainingPass

QUERY_BLOCK = 256  # queries that attend at a time
KEPT_NUMEL = 1 << 24  # pairs of tokens and heads, at most, whose weights (64 MiB) a layer keeps for the backward pass
_LEAST_FADING = 1e-30  # less has no gradient
_FAR = 1e4  # the log age of what is not there


def attend_to_kept(
    query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor, now: TrainingPass, window: int | None
) -> Tensor:
    """Attend to what lies before the pass's border; differentiable in `log_beta` `[B, Hkv, T]`.

    Query `[B, Hq, Tq, D]`, scaled, key and value `[B, Hkv, T, D]`, all float32 → `[B, Hq, Tq, D]`. A query's own token
    competes like the others. Each step judges all tokens before it anew, so one that was evicted may come back, which
    is kinder than a cache. Time is O(B · Hq · Tq · T), and a search for the border per query and KV head. Where that is
    much it is done twice, so that memory is O(B · Hq · T).
    """
    keep = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] <= KEPT_NUMEL
    attend_block = partial(_attend_block, now=now, window=window)
    return in_query_blocks(attend_block, query, key, value, log_beta, size=QUERY_BLOCK, keep=keep, reach=now.reach)


def kept_bias(log_beta: Tensor, distances: Tensor, visible: Tensor, border: Border) -> Tensor:
    """Return the logarithm of how far each key is kept, `[B, Hkv, Tq, Tk]`.

    It is 0 well above the border, and below −1,000 where nothing is seen. `log_beta` `[B, Hkv, Tk]`; `distances` and
    `visible` `[B, 1, Tq, Tk]`. Who sees no more keys than there are slots sees all, all heads alike: `[B, 1, Tq, Tk]`.
    """
    if distances.shape[3] <= border.slots:
        return torch.zeros_like(distances).masked_fill(~visible, -torch.inf)
    lasting = -torch.log(-log_beta.clamp(max=-_LEAST_FADING))[:, :, None]
    scores = lasting - torch.log(distances.clamp(min=0) + 2).masked_fill(~visible, _FAR)
    around = _largest(scores, border.slots + 1).topk(2, dim=3, largest=False, sorted=False).values
    level = around.mean(dim=3, keepdim=True).clamp(min=-_FAR / 2)
    return -functional.softplus(border.sharpness * (level - scores))  # logsigmoid, in a third of its time


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return the `count` largest of the last dimension, in any order; differentiable."""
    if scores.device.type != "cpu":
        return scores.topk(count, dim=3, sorted=False).values
    first = scores.shape[3] - count  # NumPy's partition is vectorised, topk is not: a third of its time
    order = np.argpartition(scores.detach().numpy(), first, axis=3)
    return scores.gather(3, torch.from_numpy(order[..., first:]))


def _attend_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    *,
    now: TrainingPass,
    queries: slice,
    window: int | None,
) -> Tensor:
    assert now.border is not None
    keys = slice(0, key.shape[2])
    distances = now.distances(queries, keys)
    visible = now.visible(queries, keys, distances, window)[:, None]
    bias = kept_bias(log_beta, distances[:, None], visible, now.border)
    batch, _, length, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, length, width)  # query heads by the KV head that they share
    weights = (grouped @ key[:, :, None].transpose(3, 4) + bias[:, :, None]).softmax(dim=4)
    return (weights @ value[:, :, None]).flatten(1, 2)
