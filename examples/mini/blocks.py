"""Causal attention in blocks of queries, to train on a CPU.

The backward pass of torch's own fused attention takes four times as long there on rows of 128 tokens, and what
autograd makes of these blocks longer than the one below: it fills and adds whole keys for every block. On long rows of
float32 torch's own is the faster one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "trimkv_mini_blocks"
BLOCK = 128
LONG = 1024  # tokens


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 (transformers decides this signature)
    scaling: float,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from `[B, Hq, T, D]` to all earlier tokens of the row; return `[B, T, Hq, D]`. Rows have no padding.

    The products are computed in the dtype of `value`, which is autocast's.
    """
    batch, heads, length, width = query.shape
    if value.dtype == torch.float32 and length >= LONG:
        output, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
        return output, None
    grouped = (query * scaling).to(value.dtype).reshape(-1, heads // key.shape[1], length, width)
    output = _Attention.apply(grouped, key.to(value.dtype).flatten(0, 1), value.flatten(0, 1))  # type: ignore[no-untyped-call]
    return output.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """Query `[B·Hkv, G, T, D]`, key and value `[B·Hkv, T, D]` → `[B·Hkv, G, T, D]`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        future = torch.full((BLOCK, BLOCK), float("-inf"), dtype=query.dtype).triu(1)
        weights = []
        for start, end in _blocks(query.shape[2]):
            scores = query[:, :, start:end].flatten(1, 2) @ key[:, :end].mT
            scores.view(*query.shape[:2], end - start, end)[..., start:] += future[: end - start, : end - start]
            weights.append(scores.softmax(-1))
            output[:, :, start:end] = (weights[-1] @ value[:, :end]).view_as(output[:, :, start:end])
        ctx.save_for_backward(query, key, value, output, *weights)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, output, *weights = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        means = (grads[0] * output).sum(dim=3, keepdim=True)
        for (start, end), kept in zip(_blocks(query.shape[2]), weights, strict=True):
            some, grad, mean = (x[:, :, start:end].flatten(1, 2) for x in (query, grads[0], means))
            of_value[:, :end] += kept.mT @ grad
            of_scores = (grad @ value[:, :end].mT).sub_(mean).mul_(kept)
            of_query[:, :, start:end] = (of_scores @ key[:, :end]).view_as(of_query[:, :, start:end])
            of_key[:, :end] += of_scores.mT @ some
        return of_query, of_key, of_value


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, BLOCK):
        yield start, min(start + BLOCK, length)


def register() -> None:
    """Make `NAME` an attention implementation that transformers knows."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    return None
