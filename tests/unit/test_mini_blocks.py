"""Attention in blocks with a backward pass of its own, against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from examples.mini.blocks import attend


@pytest.mark.parametrize("length", [1, 100, 128, 300])
def test_blocks_attend_as_torch_does(length: int) -> None:
    """Catches a look at later tokens, heads that meet the wrong keys, and a gradient that is not the output's."""
    torch.manual_seed(0)
    shapes = (2, 6, length, 8), (2, 3, length, 8), (2, 3, length, 8)
    states = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    wanted = functional.scaled_dot_product_attention(*states, is_causal=True, scale=0.3, enable_gqa=True)
    output, _ = attend(torch.nn.Identity(), *states, None, scaling=0.3)
    torch.testing.assert_close(output, wanted.transpose(1, 2))
    into = torch.randn_like(output)
    expected = torch.autograd.grad(wanted.transpose(1, 2), states, into)
    torch.testing.assert_close(torch.autograd.grad(output, states, into), expected)
