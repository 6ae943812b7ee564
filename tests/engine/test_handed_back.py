"""A model and its gates before an engine is assembled around them and after it is closed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.engines import Shape, greedy, make_engine, run
from trimkv_cli.bench.shapes import find_shape, random_network
from trimkv_cli.bench.speed import Case, SpeedOptions
from trimkv_cli.bench.speed import make_engine as make_measured
from trimkv_cli.loading.options import EngineOptions

LONG_ROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [3.0] * 8,
        "original_max_position_embeddings": 64,
    },
    "original_max_position_embeddings": 64,
}


def state(module: nn.Module) -> Mapping[str, Any]:
    """Return all that an engine may touch of a module: its parts, what hangs on them, tensors, plain attributes."""
    parts = dict(module.named_modules())
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        "parts": {name: id(part) for name, part in parts.items()},
        "modes": {name: part.training for name, part in parts.items()},
        "hooks": {name: (len(part._forward_pre_hooks), len(part._forward_hooks)) for name, part in parts.items()},
        "attributes": {name: sorted(vars(part)) for name, part in parts.items()},
        "rope_types": {name: part.rope_type for name, part in parts.items() if hasattr(part, "rope_type")},
        "config": repr(getattr(module, "config", None)),
        "attention": getattr(getattr(module, "config", None), "_attn_implementation", None),
        "trains": {name: tensor.requires_grad for name, tensor in tensors.items()},
        "parameters": {name: id(tensor) for name, tensor in tensors.items()},
        "alone": {name: not t.is_mkldnn and t.untyped_storage().nbytes() == t.nbytes for name, t in tensors.items()},
    }


def values(module: nn.Module) -> dict[str, Tensor]:
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in named}


def assert_equal(before: Mapping[str, Tensor], module: nn.Module) -> None:
    after = values(module)
    assert before.keys() == after.keys()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []


@pytest.mark.parametrize(
    ("family", "rows", "changes"),
    [("qwen3", 1, {}), ("llama", 4, {}), ("phi3", 4, LONG_ROPE), ("phi3", 1, {}), ("gemma3", 4, {})],
)
@pytest.mark.parametrize("fast_path", [True, False])
def test_a_closed_engine_leaves_the_model_as_it_was(
    family: str, rows: int, changes: dict[str, Any], fast_path: bool, tiny_model: Callable[..., Any]
) -> None:
    """Catches hooks, attention, packed or joined weights or fixed RoPE that stay behind, in a model that others use."""
    model = tiny_model(family, **changes)
    ids = [torch.arange(3, end)[None] for end in (20, 90)]  # the second is beyond where long factors begin
    with torch.no_grad():
        want = [model(prompt).logits for prompt in ids]
    before, tensors = state(model), values(model)
    engine = make_engine(model, Shape(kv_budget=24, rows=rows, gate="random", prefill_chunk=16), fast_path=fast_path)
    assert state(model) != before
    run(engine, [greedy(str(row), range(3, 90 - row), 8) for row in range(rows)])
    engine.close()
    assert_equal(tensors, model)
    after = state(model)
    assert {name: value for name, value in after.items() if value != before[name]} == {}
    with torch.no_grad():
        assert all(torch.equal(model(prompt).logits, logits) for prompt, logits in zip(ids, want, strict=True))


def test_gates_are_given_back_too() -> None:
    """Catches gates whose weights stay parts of one tensor for all layers."""
    network = random_network(find_shape("10m"), EngineOptions(device="cpu", dtype="fp32"))
    gates: Sequence[nn.Module] = network.gates
    before, tensors = [state(gate) for gate in gates], [values(gate) for gate in gates]
    engine = make_measured(network, Case(context=8, rows=1, kv_budget=16), SpeedOptions())
    assert [state(gate) for gate in gates] != before
    run(engine, [greedy("a", range(3, 20), 4)])
    engine.close()
    assert [state(gate) for gate in gates] == before
    for gate, own in zip(gates, tensors, strict=True):
        assert_equal(own, gate)


def test_a_failed_assembly_leaves_the_model_as_it_was(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a model with half of an engine in it after there was no memory for the other half."""
    model = tiny_model("qwen3")
    before = state(model)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("trimkv_cli.loading.assemble.Engine", fail)
    with pytest.raises(MemoryError):
        make_engine(model, Shape(rows=4, gate="random"))
    assert state(model) == before
