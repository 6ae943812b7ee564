"""The kernel that ranks slots and chunk against its reference: in the interpreter here, on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.kernel_devices import CPU, GPU
from trimkv_kernels import Slots, reference

pytest.importorskip("triton", reason="triton has no wheel for this platform")
from trimkv_kernels import ranking


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize(("size", "fill", "length"), [(37, 30, 20), (5, 5, 60), (1, 0, 1), (1100, 1100, 1030)], ids=str)
@pytest.mark.parametrize("kind", ["alike", "odd", "static"])
def test_the_same_tokens_take_the_same_slots(kind: str, size: int, fill: int, length: int, device: str) -> None:
    """Catches a sign in the wrong order, a tie, two zeros, padding that stays, a block's number begun anew."""
    torch.manual_seed(0)
    rows, heads = 1 if size > 1000 else 2, 1
    slots = Slots.empty(
        rows=rows + 1, num_kv_heads=heads, slots=size, head_dim=16, dtype=torch.float32, device=torch.device(device)
    )
    order = torch.stack([torch.randperm(fill + 9)[:fill] for _ in range((rows + 1) * heads)])
    slots.position[:, :, :fill] = order.view(rows + 1, heads, fill).int().to(device)
    held, new = (torch.randn(shape) for shape in ((rows + 1, heads, fill), (rows, heads, length)))
    for scores in (held, new):
        if kind != "static":
            scores.abs_().neg_()
        if kind == "alike":
            scores.fill_(-0.5)
        if kind == "odd":
            scores[..., ::3], scores[..., 1::5], scores[..., 2::7] = -0.0, torch.nan, torch.inf
            scores[..., 3::4] = 0.0
    slots.log_beta[:, :, :fill] = held.to(device)
    positions = torch.full((rows, length), -1, dtype=torch.int32)
    positions[0] = torch.arange(fill + 9, fill + 9 + length)
    positions[-1, : length // 2] = -1  # on the left
    how: dict[str, Any] = {"rows": torch.arange(rows, 0, -1, device=device), "fill": fill, "static": kind == "static"}
    how |= {"window": 9 if kind == "alike" else None, "recent": 3 if kind == "odd" else 0}
    how["spans"] = torch.tensor([[[-2, 3], [20, 22]]] * rows, dtype=torch.int32, device=device)
    given = new.to(device), positions.to(device), slots
    want = reference.survivors(*given, **how)
    number, vacant = ranking.survivors(*given, **how)
    got = torch.where(number >= 0, vacant.gather(2, number.clamp(min=0).long()), -1)
    assert torch.equal(got.long(), want)
