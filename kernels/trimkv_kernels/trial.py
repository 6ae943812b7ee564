"""One trivial kernel, to find out whether Triton runs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def run_trial(device: torch.device) -> None:
    """Compile, launch and check a kernel; raises whatever keeps Triton from it."""
    numbers = torch.zeros(16, dtype=torch.int32, device=device)
    _count[(1,)](numbers, SIZE=16)
    if numbers.tolist() != list(range(16)):
        raise RuntimeError("a trivial kernel computes wrongly")


@triton.jit
def _count(numbers, SIZE: tl.constexpr):
    """Write to each place its number."""
    place = tl.arange(0, SIZE)
    tl.store(numbers + place, place)
