"""The losses: the student's distance from the teacher and from the text, and the capacity that it exceeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trimkv_cli.train.training_pass import TrainingPass, recompute

CHUNK_NUMEL = 1 << 25  # logits that exist at a time: 128 MiB in float32

Head = Callable[[Tensor], Tensor]


def distill(
    student: Tensor, teacher: Tensor, targets: Tensor, head: Head, *, vocab_size: int, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return `KL(p_full ‖ p_gated)` and the student's next-token loss, each summed over the N tokens.

    `student` and `teacher` `[N, hidden]` enter `head`, which makes logits `[n, vocab]`; `targets` `[N]`. The logits of
    `chunk` tokens exist at a time, in the backward pass too, where they are computed again.
    """
    chunk = chunk or max(16, CHUNK_NUMEL // vocab_size)
    if len(targets) <= chunk:
        return _distill_chunk(student, teacher, targets, head)
    kl = ntp = student.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets), chunk):
        part = [x[start : start + chunk] for x in (student, teacher, targets)]
        more = recompute(_distill_chunk, *part, head)
        kl, ntp = kl + more[0], ntp + more[1]
    return kl, ntp


def _distill_chunk(student: Tensor, teacher: Tensor, targets: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        full = functional.log_softmax(head(teacher).float(), dim=-1)
    gated = functional.log_softmax(head(student).float(), dim=-1)
    kl = functional.kl_div(gated, full, reduction="sum", log_target=True)
    return kl, functional.nll_loss(gated, targets, reduction="sum")


BLOCK = 512


def capacity_excess(
    log_beta: Tensor, now: TrainingPass, weights: Tensor, *, memory_size: int, window: int | None = None
) -> Tensor:
    """Return `Σ_t weight_t · max(0, Σ_{i≤t} beta_i^(t−i) − M)`, summed over rows and heads, in float32.

    `log_beta` `[B, Hkv, T]`, `weights` `[B, T]` (0 for padding). A token counts only for its own document and within
    the window. Time is O(B · Hkv · T²): one exponential per pair of tokens and head forward, and backward one for each
    query that is over its budget. Memory is O(B · Hkv · T): pairs are met in blocks of 512 × 512 and forgotten.
    """
    excess: Tensor = _Excess.apply(log_beta.float(), now, weights, memory_size, window)  # type: ignore[no-untyped-call]
    return excess


def place_weights(documents: Tensor) -> Tensor:
    """Return 1/t for the t-th token of each document, 0 for padding: `[B, T]`."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = torch.where(starts, index, 0).cummax(dim=1).values
    return torch.where(documents < 0, 0.0, 1.0 / (index - first + 1))


class _Excess(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, log_beta: Tensor, now: TrainingPass, weights: Tensor, memory_size: int, window: int | None
    ) -> Tensor:
        held = torch.zeros_like(log_beta)
        for queries, keys in _blocks(log_beta.shape[2]):
            held[:, :, queries] += _retained(log_beta, now, window, queries, keys)[0].sum(dim=3)
        over = (held - memory_size).clamp_(min=0)
        ctx.save_for_backward(log_beta, weights[:, None] * (over > 0))
        ctx.now, ctx.window = now, window
        return (weights[:, None] * over).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        log_beta, slope = ctx.saved_tensors
        result = torch.zeros_like(log_beta)
        blocks = [slope[:, :, start : start + BLOCK].any() for start in range(0, slope.shape[2], BLOCK)]
        busy = torch.stack(blocks).tolist()
        for queries, keys in _blocks(log_beta.shape[2]):
            if busy[queries.start // BLOCK]:
                retained, distances = _retained(log_beta, ctx.now, ctx.window, queries, keys)
                result[:, :, keys] += torch.einsum("bhqk,bhq->bhk", retained.mul_(distances), slope[:, :, queries])
        return result * grads[0], None, None, None, None


def _blocks(length: int) -> list[tuple[slice, slice]]:
    starts = range(0, length, BLOCK)
    cut = [slice(start, min(start + BLOCK, length)) for start in starts]
    return [(queries, keys) for queries in cut for keys in cut if keys.start <= queries.start]


def _retained(
    log_beta: Tensor, now: TrainingPass, window: int | None, queries: slice, keys: slice
) -> tuple[Tensor, Tensor]:
    """Return `beta_i^(t−i)` `[B, Hkv, Tq, Tk]`, 0 where the key is not visible, and the distances `[B, 1, Tq, Tk]`."""
    distances = now.distances(queries, keys)
    visible = now.visible(queries, keys, distances, window)[:, None]
    exponents = (distances[:, None] * log_beta[:, :, None, keys]).masked_fill_(~visible, -torch.inf)
    return exponents.exp_(), distances[:, None]
