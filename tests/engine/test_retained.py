"""Mistakes in what the engine says a cache holds: against the slots themselves, and against what really goes next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from helpers.engines import Shape, greedy, make_engine, run
from trimkv_cli.events import Retained

PROMPT = range(3, 90)
TinyModel = Callable[..., Any]


def retained_after(model: Any, count: int) -> tuple[Retained, list[list[list[int]]]]:
    engine = make_engine(model, Shape(kv_budget=16, rows=1, gate="random"))
    run(engine, [greedy("a", PROMPT, count, keep=True)])
    return engine.kept.retained("a"), engine.kept.positions("a")


def test_it_is_what_the_slots_hold(tiny_model: TinyModel) -> None:
    """Catches positions out of order, a threshold that is not the lowest score, and free slots taken for full."""
    retained, kept = retained_after(tiny_model("qwen3"), 4)
    assert retained.seen == len(PROMPT) + 3
    assert [[list(head.positions) for head in layer.heads] for layer in retained.layers] == kept
    for _, head in retained.heads:
        scores = [b * (retained.seen + 1 - p) for p, b in zip(head.positions, head.log_beta, strict=True)]
        assert head.threshold == pytest.approx(min(scores))


def test_what_is_named_next_goes_next(tiny_model: TinyModel) -> None:
    """Catches a forecast that the next eviction does not bear out."""
    before, _ = retained_after(tiny_model("qwen3"), 8)
    _, after = retained_after(tiny_model("qwen3"), 9)
    for layer, heads in zip(before.layers, after, strict=True):
        for head, later in zip(layer.heads, heads, strict=True):
            forecast = Retained(seen=before.seen, layers=(type(layer)(slots=16, window=None, heads=(head,)),))
            gone = {*head.positions} - {*later}
            assert gone <= {position for position, _ in forecast.next_out()}


def test_a_window_forgets_what_left_it(tiny_model: TinyModel) -> None:
    """Catches tokens that lie in a slot although no query can see them any more."""
    retained, _ = retained_after(tiny_model("mistral"), 4)
    for layer, head in retained.heads:
        assert layer.window == 11
        assert all(position >= retained.seen - 11 for position in head.positions)
