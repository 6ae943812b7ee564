"""Mistakes of KeyDiff in an engine: a bound that is passed, ways of decoding that differ, copies that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.engines import Shape, greedy, make_engine, run
from trimkv_cli.engine.engine import Engine
from trimkv_cli.model.pins import Pins

TinyModel = Callable[..., Any]
SHAPE = Shape(kv_budget=12, rows=2, prefill_chunk=8, gate="keydiff")
PROMPT = tuple(range(3, 50))


def two(engine: Engine) -> tuple[dict[str, list[int]], list[Any]]:
    output = run(engine, [greedy("a", PROMPT, 15, keep=True), greedy("b", PROMPT[:5], 15, keep=True)])
    return output, [engine.kept.positions(name) for name in ("a", "b")]


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_every_way_of_decoding_keeps_the_same(family: str, tiny_model: TinyModel) -> None:
    """Catches a path that ranks without the keys, one that passes the bound, and sinks that it evicts."""
    model = tiny_model(family)
    fast = two(make_engine(model, SHAPE))
    slow_engine = make_engine(model, SHAPE, fast_path=False)
    ahead = make_engine(model, SHAPE, fast_path=False)
    ahead._runner.run_ahead(frozenset())
    assert two(slow_engine) == fast == two(ahead)
    for layer, window in zip(fast[1][0], slow_engine.facts.spec.windows, strict=True):
        for head in layer:
            assert len(head) == 12 if window is None else len(head) <= 12
            assert window is not None or head[:4] == [0, 1, 2, 3]
    recency = two(make_engine(model, replace(SHAPE, gate="streaming")))
    assert recency[1] != fast[1]
    whole = make_engine(model, replace(SHAPE, kv_budget=96))
    assert two(whole)[0] == two(make_engine(model, replace(SHAPE, kv_budget=96, gate="none")))[0]


def test_a_row_may_be_copied_saved_and_taken_a_step_back(tiny_model: TinyModel) -> None:
    """Catches scores that belong to another row, that a state loses, or that a step which was undone leaves behind."""
    engine = make_engine(tiny_model("llama"), replace(SHAPE, rows=3), pins=Pins(recent=2))
    run(engine, [greedy("a", PROMPT, 5, keep=True)])
    state = engine.kept.save("a")
    engine.kept.restore(state, "copy")
    following = [greedy(to, PROMPT[9:20], 9, keep=True, continues=of) for of, to in (("a", "b"), ("copy", "c"))]
    output = run(engine, following)
    assert output["b"] == output["c"]
    assert engine.kept.positions("b") == engine.kept.positions("c")

    def decoded(*, undone: bool) -> tuple[tuple[int, ...], Any]:
        fresh = make_engine(tiny_model("llama"), replace(SHAPE, rows=1))
        fresh.add(greedy("x", PROMPT, 9, keep=True))
        while fresh.has_work:
            fresh.step()
            row = fresh._scheduler.running.get(0)
            if undone and row is not None and len(row.output) in (3, 6):
                assert fresh._runner._decoder is not None
                with torch.inference_mode():
                    step = torch.tensor([row.output[-1]]), torch.tensor([row.seen], dtype=torch.int32)
                    fresh._runner._decoder.step(*step, dense=True)
                    fresh._runner.undo_decode([row])
        return fresh.kept.token_ids("x"), fresh.kept.positions("x")

    assert decoded(undone=True) == decoded(undone=False)


def test_a_smaller_cache_keeps_the_best(tiny_model: TinyModel) -> None:
    """Catches a resize that ranks by age."""
    engine = make_engine(tiny_model("llama"), replace(SHAPE, rows=1))
    run(engine, [greedy("a", PROMPT, 9, keep=True)])
    retained = engine.kept.retained("a")
    assert retained.static
    engine._runner.resize(7, [])
    for before, after in zip(retained.layers, engine.kept.positions("a"), strict=True):
        for head, positions in zip(before.heads, after, strict=True):
            rank = sorted(zip(head.positions, head.log_beta, strict=True), key=lambda pair: (-pair[1], pair[0]))
            assert positions == sorted(position for position, _ in rank[:7])
