"""Products of the CPU's decoder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from trimkv_cli.engine.cpu.blocks import WORTH_PACKING, ReorderedLinear, pack, packing_pays, project


@pytest.mark.parametrize("outputs", [(128, 64), (24, 8)], ids=["pieces", "whole"])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_layers_that_lie_together_give_their_products(rows: int, outputs: tuple[int, int]) -> None:
    """Catches pieces of a matrix put together in another order, or rows taken for columns."""
    linears = [nn.Linear(24, count) for count in outputs]
    x = torch.randn(rows, 24)
    expected = torch.cat([linear(x) for linear in linears], dim=-1)
    with torch.inference_mode(), ExitStack() as undo:
        torch.testing.assert_close(project(linears, undo)(x), expected)
        torch.testing.assert_close(torch.cat([linear(x) for linear in linears], dim=-1), expected)
        torch.testing.assert_close(project([ReorderedLinear(linear) for linear in linears], undo)(x), expected)


def test_a_packed_model_is_the_same_and_gets_its_layers_back(tiny_model: Callable[..., Any]) -> None:
    """Catches weights that change on the way there or back, and a model that stays packed when its engine is done."""
    model = tiny_model("qwen3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids, undo = torch.arange(3, 12)[None], ExitStack()
    with torch.inference_mode():
        want = model(ids).logits
        pack(model, undo)
        assert sum(type(module) is ReorderedLinear for module in model.modules()) == 7 * model.config.num_hidden_layers
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
        undo.close()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_one_matrix_at_a_time_is_there_twice(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a list of plain layers that lives as long as packing does: a second copy of all, which no plan counts."""
    model = tiny_model("qwen3")
    linears = [module for module in model.get_decoder().layers.modules() if type(module) is nn.Linear]
    plain = [StorageWeakRef(linear.weight.untyped_storage()) for linear in linears]
    alive, make = [], ReorderedLinear.__init__

    def watch(packed: ReorderedLinear, linear: nn.Linear) -> None:
        alive.append(sum(not storage.expired() for storage in plain))
        make(packed, linear)

    monkeypatch.setattr(ReorderedLinear, "__init__", watch)
    pack(model, ExitStack())
    assert alive == list(range(len(plain), 0, -1))


def test_few_rows_are_not_packed(tiny_model: Callable[..., Any]) -> None:
    """Catches packing where it makes a step slower."""
    assert not packing_pays(tiny_model("qwen3"), rows=WORTH_PACKING - 1)
