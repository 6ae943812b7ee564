"""Products of the CPU's decoder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trimkv_cli.engine import blocks


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_pieces_of_a_matrix_give_the_product(rows: int, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches pieces put together in another order, which only large models would meet."""
    linears = [nn.Linear(24, 16), nn.Linear(24, 8)]
    x = torch.randn(rows, 24)
    expected = torch.cat([linear(x) for linear in linears], dim=-1)
    monkeypatch.setattr(blocks, "WORTH_WAKING", 0)
    with torch.inference_mode():
        made = blocks.Projection(linears, threads=2, transposed=transposed)(x)
    torch.testing.assert_close(made, expected)
