"""A decode step that failed, or that nobody wants any more, leaves no trace in the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.engines import Shape, greedy, make_engine
from trimkv_cli.cache.retention_cache import RetentionCache
from trimkv_kernels import SlotPool

TinyModel = Callable[..., Any]
PROMPTS = (range(3, 12), range(20, 60), range(5, 95))  # below the budget, past a window, past the budget


class Fault(Exception):
    pass


def fail(*_: Any, **__: Any) -> None:
    raise Fault


def copied(cache: RetentionCache) -> list[torch.Tensor]:
    return [tensor.clone() for layer in cache.layers for tensor in layer.slots]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("failing_layer", [0, 1, 5, 7])
def test_a_decode_that_failed_at_any_layer_can_be_undone(
    failing_layer: int, deterministic: bool, tiny_model: TinyModel
) -> None:
    """Catches a displaced slot that does not come back, and an undo in layers that the step never reached."""
    model = tiny_model("gemma3")  # seven layers, some with a window
    engine = make_engine(model, Shape(kv_budget=24, gate="random", deterministic=deterministic), fast_path=False)
    for index, prompt in enumerate(PROMPTS):
        engine.add(greedy(str(index), prompt, 40))
    for _ in range(9):
        engine.step()
    cache = engine._runner.cache
    before, positions = copied(cache), list(cache.seen)[: len(PROMPTS)]
    layers = model.get_decoder().layers
    module = layers[failing_layer].mlp if failing_layer < len(layers) else model.lm_head
    fault = module.register_forward_pre_hook(fail)
    with pytest.raises(Fault):
        engine.step()
    fault.remove()
    changed = [not torch.equal(now, then) for now, then in zip(copied(cache), before, strict=True)]
    assert any(changed), "the step has displaced nothing"
    cache.undo_decode(positions)
    assert all(torch.equal(now, then) for now, then in zip(copied(cache), before, strict=True))
    assert cache.seen[: len(PROMPTS)] == positions


@pytest.mark.parametrize("failing_call", ["begin", "attend", "evict"])
def test_a_decode_over_pools_that_failed_can_be_undone(
    failing_call: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the same where all layers evict together, with an earlier step's journal still there."""
    engine = make_engine(tiny_model("qwen3"), Shape(kv_budget=24, gate="random"))
    for index, prompt in enumerate(PROMPTS):
        engine.add(greedy(str(index), prompt, 40))
    for _ in range(9):
        engine.step()
    cache = engine._runner.cache
    before, positions = copied(cache), list(cache.seen)[: len(PROMPTS)]
    monkeypatch.setattr(SlotPool, failing_call, fail)
    with pytest.raises(Fault):
        engine.step()
    cache.undo_decode(positions)
    assert all(torch.equal(now, then) for now, then in zip(copied(cache), before, strict=True))


def test_a_finished_decode_can_be_undone_for_some_rows(tiny_model: TinyModel) -> None:
    """Catches an undo that touches rows which go on, and a count of seen tokens that stays behind."""
    engine = make_engine(tiny_model("qwen3"), Shape(kv_budget=8, gate="random"))
    for index, prompt in enumerate(PROMPTS):
        engine.add(greedy(str(index), prompt, 40))
    engine.step()
    cache = engine._runner.cache
    before, seen = copied(cache), list(cache.seen)
    engine.step()
    after = copied(cache)
    cache.undo_decode([-1, seen[1]])
    for now, then, later in zip(copied(cache), before, after, strict=True):
        assert torch.equal(now[1], then[1])
        assert torch.equal(now[[0, 2]], later[[0, 2]])
    assert cache.seen[:3] == [seen[0] + 1, seen[1], seen[2] + 1]
