"""Slots per head that change while requests run: nothing is lost but what the new size cannot hold."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers.engines import Shape, greedy, make_engine, run
from trimkv_cli.engine.devices import reset_peak
from trimkv_cli.engine.engine import Engine
from trimkv_cli.errors import ContextOverflow, DoesNotFit, UsageError

TinyModel = Callable[..., Any]
LONG = [3 + 7 * n % 90 for n in range(70)]


def start(engine: Engine, request: Any, steps: int) -> list[int]:
    engine.add(request)
    return [token for _ in range(steps) for event in engine.step() for token in event.token_ids]


def finish(engine: Engine) -> list[int]:
    tokens = []
    while engine.has_work:
        tokens += [token for event in engine.step() for token in event.token_ids]
    return tokens


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_fewer_slots_keep_the_best_by_score(family: str, tiny_model: TinyModel) -> None:
    """Catches the newest or the first slots kept instead of the best, and a wrong count of what went."""
    engine = make_engine(tiny_model(family), Shape(kv_budget=24, rows=3, gate="random", prefill_chunk=16))
    run(engine, [greedy("a", LONG, 5, keep=True)])
    held = engine.kept.retained("a")
    done = engine.resize(9)
    expected = 0
    for layer, kept in zip(held.layers, engine.kept.positions("a"), strict=True):
        size = 9 if layer.window is None else min(9, layer.window)
        for head, positions in zip(layer.heads, kept, strict=True):
            scores = {p: b * (held.seen + 1 - p) for p, b in zip(head.positions, head.log_beta, strict=True)}
            best = sorted(scores, key=lambda p: (-scores[p], p))[:size]
            assert [p for p in positions if p in scores] == sorted(best)
            expected += (24 if layer.window is None else min(24, layer.window)) - size
    assert (done.kv_budget_before, done.kv_budget, done.evicted) == (24, 9, expected)
    assert done.kv_bytes == engine.kv_bytes < done.kv_bytes_before
    assert engine.facts.plan.run.kv_budget == 9
    assert engine.fingerprint["kv_budget"] == "9"


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gemma3"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_more_slots_change_nothing_while_nothing_was_evicted(
    family: str, deterministic: bool, tiny_model: TinyModel
) -> None:
    """Catches slots that move wrongly, and new ones that are taken for full."""
    shape = Shape(kv_budget=100, rows=2, gate="random", deterministic=deterministic)
    want = run(make_engine(tiny_model(family), shape), [greedy("a", LONG, 20)])["a"]
    engine = make_engine(tiny_model(family), replace(shape, kv_budget=80))
    got = start(engine, greedy("a", LONG, 20), 6)
    assert engine.resize(100).evicted == 0
    assert got + finish(engine) == want


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@example(sizes=[3, 3, 3, 9], steps=12)
@given(sizes=st.lists(st.integers(3, 40), min_size=1, max_size=4), steps=st.integers(1, 12))
def test_sequences_go_on_through_any_changes_of_size(tiny_model: TinyModel, sizes: list[int], steps: int) -> None:
    """Catches a fill that is taken for the number of tokens seen after a cache has grown."""
    engine = make_engine(tiny_model("gemma3"), Shape(kv_budget=16, rows=2, gate="random", prefill_chunk=16))
    engine.add(greedy("b", LONG[:9], 30, keep=True))
    start(engine, greedy("a", LONG, 30, keep=True), steps)
    for size in sizes:
        engine.resize(size)
        for _ in range(3):
            engine.step()
    finish(engine)
    for key in "ab":
        for layer, heads in zip(engine.kept.retained(key).layers, engine.kept.positions(key), strict=True):
            for head in heads:
                assert len(head) == len(set(head)) <= layer.slots
                assert head[-1] < engine.kept.seen(key)
    cache = engine._runner.cache
    for row in engine._scheduler.parked.values():
        for index, layer in enumerate(cache.layers):
            in_use = (layer.slots.position[row.index] >= 0).sum(dim=-1)
            used = cache._used(row.index, index)
            # In a layer that has grown a head takes the place of a token that left the window before an empty one.
            grown = layer.window is not None and cache._missing[index][row.index] > 0
            assert (1 if grown else used) <= in_use.min()
            assert in_use.max() <= used
    engine.close()


def test_a_saved_turn_can_be_restored_into_another_size(tiny_model: TinyModel) -> None:
    """Catches an undo that fails, or holds more than there are slots, after the size was changed."""
    engine = make_engine(tiny_model("qwen3"), Shape(kv_budget=24, rows=1, gate="random", prefill_chunk=16))
    run(engine, [greedy("a", LONG, 5, keep=True)])
    saved, kept = engine.kept.save("a"), engine.kept.positions("a")
    for size in (30, 9):
        engine.resize(size)
        engine.kept.release("a")
        engine.kept.restore(saved, "a")
        for before, now in zip(kept, engine.kept.positions("a"), strict=True):
            for all_of, some in zip(before, now, strict=True):
                assert len(some) == min(24, size)
                assert set(some) <= set(all_of)
    run(engine, [greedy("b", (1, 2, 3), 5, continues="a")])


@pytest.mark.skipif(sys.platform != "linux", reason="where else memory is measured, nothing sets a peak back")
def test_a_smaller_budget_is_held_and_so_is_the_old_one_meanwhile(tiny_model: TinyModel) -> None:
    """Catches a budget that never shrinks, slots that are there twice meanwhile, memory that is not given back."""
    shape = Shape(kv_budget=40_000, rows=1, gate="random", prefill_chunk=16)
    engine = make_engine(tiny_model("qwen3", num_hidden_layers=8), shape)
    run(engine, [greedy("a", LONG, 5, keep=True)])
    kept, process = engine.kept.positions("a"), psutil.Process()
    roomy = engine.facts.plan.with_budget(2**40).run.total_bytes
    assert engine.set_budget(roomy).kv_budget == 40_000
    held = process.memory_info().rss
    engine._runner.resize = watched = Watched(engine._runner.resize, engine)  # type: ignore[method-assign]
    done = engine.set_budget(roomy - engine.facts.plan.run.kv_bytes_per_row // 2)
    freed = done.kv_bytes_before - done.kv_bytes
    assert done.kv_budget < 30_000
    assert done.evicted == 0
    assert engine.kept.positions("a") == kept
    assert watched.peak - held < done.kv_bytes_before * 0.25
    assert held - process.memory_info().rss > 0.9 * freed > 2**24
    assert engine.peak_bytes < held - 0.8 * freed
    assert engine.facts.plan.run.total_bytes <= (engine.facts.plan.budget_bytes or 0)
    assert engine.set_budget(2 * roomy).kv_budget == done.kv_budget
    assert engine.resize(39_000).evicted == 0
    run(engine, [greedy("b", (1, 2, 3), 5, continues="a")])


class Watched:
    """Note the peak of memory at the end of a call."""

    def __init__(self, call: Callable[..., int], engine: Engine) -> None:
        self._call = call
        self._engine = engine
        self.peak = 0

    def __call__(self, *arguments: Any) -> int:
        reset_peak(torch.device("cpu"))
        done = self._call(*arguments)
        self.peak = self._engine.peak_bytes
        return done


def test_a_smaller_budget_evicts_the_worst(tiny_model: TinyModel) -> None:
    """Catches a budget below what is in use that is refused, or that loses more than it must."""
    engine = make_engine(tiny_model("gemma3"), Shape(kv_budget=24, rows=1, gate="random", prefill_chunk=16))
    run(engine, [greedy("a", LONG, 5, keep=True)])
    plan = engine.facts.plan.with_budget(2**40)
    engine.set_budget(plan.run.total_bytes)
    done = engine.set_budget(plan.with_slots(9).run.total_bytes)
    assert (done.kv_budget_before, done.kv_budget) == (24, 9)
    assert done.evicted > 0
    other = make_engine(tiny_model("gemma3"), Shape(kv_budget=24, rows=1, gate="random", prefill_chunk=16))
    run(other, [greedy("a", LONG, 5, keep=True)])
    assert other.resize(9).evicted == done.evicted
    assert other.kept.positions("a") == engine.kept.positions("a")
    with pytest.raises(DoesNotFit, match="1 slot per head needs"):
        engine.set_budget(2**20)
    assert engine.facts.plan.budget_bytes == plan.with_slots(9).run.total_bytes


def test_a_size_that_cannot_be_is_refused_before_anything_changes(tiny_model: TinyModel) -> None:
    """Catches tokens lost for a size that is then refused."""
    full = make_engine(tiny_model("qwen3"), Shape(kv_budget=96, rows=1))
    run(full, [greedy("a", LONG, 5, keep=True)])
    kept = full.kept.positions("a")
    with pytest.raises(ContextOverflow, match="cannot hold"):
        full.resize(50)
    with pytest.raises(UsageError, match="keeps no token"):
        full.resize(0)
    talk = make_engine(tiny_model("qwen3"), Shape(kv_budget=24, rows=1, gate="random"))
    run(talk, [greedy("a", LONG[:20], 5, keep=True)])
    talk.kept.pin("a", range(9))
    with pytest.raises(UsageError, match="9 tokens are pinned"):
        talk.resize(9)
    talk.resize(10)
    assert all(set(range(9)) <= set(head) for layer in talk.kept.positions("a") for head in layer)
    run_ = full.facts.plan.run
    budget = run_.total_bytes + run_.kv_bytes_per_row // 2
    full.facts = replace(full.facts, plan=replace(full.facts.plan, budget_bytes=budget))
    with pytest.raises(DoesNotFit) as caught:
        full.resize(400)
    most = int(str(caught.value.hint).split()[2])
    assert full.kept.positions("a") == kept
    full.resize(most)
    assert full.kept.positions("a") == kept


def test_states_that_are_kept_shrink_with_the_slots(tiny_model: TinyModel) -> None:
    """Catches copies for undo that stay as large as they were, beside a plan that counts them as small."""
    engine = make_engine(tiny_model("gemma3"), Shape(kv_budget=24, rows=1, gate="random", prefill_chunk=16))
    run(engine, [greedy("a", LONG, 5, keep=True)])
    whole = engine.kept.save("a")
    engine.resize(9)
    fitted = engine.kept.fitted(whole)
    assert fitted.nbytes < whole.nbytes
    kept = []
    for state in (whole, fitted):
        engine.kept.release("a")
        engine.kept.restore(state, "a")
        kept.append(engine.kept.positions("a"))
    assert kept[0] == kept[1]
