"""The losses on tokens: how far the student is from the teacher, and from the text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from trimkv_cli.train.recompute import recompute

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
