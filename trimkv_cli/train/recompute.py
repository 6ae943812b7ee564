"""What the backward pass computes again, so that the forward pass need not keep it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def in_query_blocks(
    attend_block: Callable[..., Tensor],
    query: Tensor,
    *states: Tensor,
    size: int,
    keep: bool,
    reach: Callable[[slice], int],
) -> Tensor:
    """Attend from `size` queries at a time, `[B, H, Tq, D]`, to the `states` that they `reach`, `[B, Hkv, T, …]`.

    What lives at a time is size · T, never T · T, unless the backward pass is to find all of it kept. `attend_block` is
    called with the queries, those states, and which the queries are: `queries=slice`.
    """
    length, outputs = query.shape[2], []
    for start in range(0, length, size):
        queries = slice(start, min(start + size, length))
        attend = partial(attend_block, queries=queries)
        inputs = query[:, :, queries], *(each[:, :, : reach(queries)] for each in states)
        outputs.append(attend(*inputs) if keep else recompute(attend, *inputs))
    return torch.cat(outputs, dim=2)
