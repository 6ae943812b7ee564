"""Mistakes of pinned tokens: evicted all the same, or taken for the worst because their score is infinite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.engines import Shape, greedy, make_engine, run
from trimkv_cli.engine.engine import Engine
from trimkv_cli.errors import UsageError
from trimkv_cli.model.pins import Pins

TinyModel = Callable[..., Any]
SHAPE = Shape(kv_budget=11, rows=2, prefill_chunk=16, gate="random")
PROMPT = tuple(range(3, 60))


def make_pinned(model: Any, pins: Pins, shape: Shape = SHAPE, *, fast_path: bool = True) -> Engine:
    return make_engine(model, shape, pins=pins, fast_path=fast_path)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_pinned_tokens_outlive_every_other(family: str, tiny_model: TinyModel) -> None:
    """Catches sinks and system messages that prefill, a later chunk or decode evicts, in one row or in a shared one."""
    engine = make_pinned(tiny_model(family), Pins(system=True, sinks=2))
    # Both rows begin with the same system message: the second gets a copy of the first one's slots.
    requests = [greedy(name, PROMPT, 30, keep=True, prefix_len=5) for name in ("a", "b")]
    output = run(engine, requests)
    assert output["a"] == output["b"]
    for name in output:
        for layer, window in zip(engine.kept.positions(name), engine.facts.spec.windows, strict=True):
            for head in layer:
                assert len(head) == 11 if window is None else len(head) <= 11
                assert window is not None or head[:5] == [0, 1, 2, 3, 4]
    assert run(make_engine(tiny_model(family), SHAPE), [greedy("x", PROMPT, 30)])["x"] != output["a"]


def test_short_prompts_pin_what_follows_them(tiny_model: TinyModel) -> None:
    """Catches sinks that are counted in the prompt alone."""
    engine = make_pinned(tiny_model("qwen3"), Pins(sinks=6))
    run(engine, [greedy("a", PROMPT[:2], 40, keep=True)])
    assert all(head[:6] == list(range(6)) for layer in engine.kept.positions("a") for head in layer)


def test_a_pin_set_later_holds_and_is_saved(tiny_model: TinyModel) -> None:
    """Catches pins that a saved state loses, and what lasts being said to end."""
    engine = make_engine(tiny_model("qwen3"), replace(SHAPE, rows=1))
    run(engine, [greedy("a", PROMPT, 3, keep=True)])
    position = engine.kept.positions("a")[0][0][0]
    holders = sum(position in head for layer in engine.kept.positions("a") for head in layer)
    assert engine.kept.pin("a", [position]) == holders
    assert engine.kept.retained("a").survivals()[position] == torch.inf
    state = engine.kept.save("a")
    engine.kept.release("a")
    engine.kept.restore(state, "a")
    run(engine, [greedy("b", PROMPT, 30, keep=True, continues="a")])
    assert sum(position in head for layer in engine.kept.positions("b") for head in layer) == holders
    with pytest.raises(UsageError, match="leave none of 11 slots"):
        engine.kept.pin("b", range(200))


def test_only_so_long_a_system_message_is_pinned(tiny_model: TinyModel) -> None:
    """Catches a default that fills the slots, half a message that stays, and one that a smaller cache refuses."""
    pins = Pins.parse("system:40%")
    assert (str(pins), pins.system_most(11), Pins.parse("system:4").system_most(11)) == ("system:40%", 4, 4)
    engine = make_pinned(tiny_model("qwen3"), pins)
    for length, stays in ((4, True), (5, False)):
        request = greedy(str(length), PROMPT, 30, keep=True, prefix_len=length)
        engine.check(request)
        run(engine, [request])
        first = [head[:length] == list(range(length)) for layer in engine.kept.positions(str(length)) for head in layer]
        assert all(first) == stays
    engine.check(greedy("whole", PROMPT, 3, prefix_len=40))


def test_as_many_pins_as_slots_are_refused(tiny_model: TinyModel) -> None:
    """Catches a cache that pins fill, and parts that nobody knows."""
    engine = make_pinned(tiny_model("qwen3"), Pins(system=True, sinks=4))
    with pytest.raises(UsageError, match="11 pinned tokens leave none of 11 slots"):
        engine.check(greedy("a", PROMPT, 3, prefix_len=11))
    engine.check(greedy("a", PROMPT, 3, prefix_len=10))
    assert Pins.parse("system, sinks:4") == Pins(system=True, sinks=4)
    assert str(Pins.parse("sinks:4,system")) == "system,sinks:4"
    assert Pins.parse(None) == Pins()
    assert Pins.parse("recent:8,sinks:2").count(5, 11) == 10
    assert str(Pins.parse("recent:8,sinks:2")) == "sinks:2,recent:8"
    assert str(Pins.parse("prompt:10%,system")) == "system,prompt:10%"
    for wrong in (
        "",
        "sinks",
        "sinks:0",
        "sinks:-1",
        "sinks:5%",
        "tail:3",
        "system,,",
        "prompt",
        "prompt:0%",
        "prompt:%",
    ):
        with pytest.raises(UsageError, match="cannot be pinned"):
            Pins.parse(wrong)


def test_a_kept_row_with_pins_is_left_alone_while_others_decode(tiny_model: TinyModel) -> None:
    """Catches a pinned slot of a row without a token that a decode beside it takes, its age being negative."""
    engine = make_pinned(tiny_model("llama"), Pins(sinks=4), replace(SHAPE, rows=3))
    run(engine, [greedy("a", PROMPT, 5, keep=True)])
    before = engine.kept.positions("a"), engine.kept.retained("a")
    run(engine, [greedy("b", PROMPT[5:], 20, keep=True), greedy("c", PROMPT[9:], 20, keep=True)])
    assert (engine.kept.positions("a"), engine.kept.retained("a")) == before


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("fast_path", [True, False])
def test_the_newest_tokens_stay(family: str, fast_path: bool, tiny_model: TinyModel) -> None:
    """Catches recent tokens that are evicted, ones that stay longer, and empty slots taken for recent ones."""
    engine = make_pinned(tiny_model(family), Pins(sinks=2, recent=5), fast_path=fast_path)
    run(engine, [greedy("short", PROMPT[:2], 3, keep=True)])
    assert engine.kept.positions("short")[0][0] == list(range(4))
    run(engine, [greedy("a", PROMPT, 30, keep=True)])
    seen = engine.kept.seen("a")
    for layer, window in zip(engine.kept.positions("a"), engine.facts.spec.windows, strict=True):
        for head in layer:
            assert head[-5:] == list(range(seen - 5, seen))
            assert window is not None or head[:2] == [0, 1]
    free = make_engine(tiny_model(family), SHAPE)
    run(free, [greedy("a", PROMPT, 30, keep=True)])
    assert free.kept.positions("a") != engine.kept.positions("a")
    assert engine.kept.positions("short")[0][0] == list(range(4))  # a row without a token was left alone
    retained = engine.kept.retained("a")
    assert min(retained.survivals()[-4:]) >= 1
    assert all(position < seen - 5 for position, _ in retained.next_out())


@pytest.mark.parametrize(
    ("family", "way"), [("qwen3", "fast"), ("gemma3", "fast"), ("qwen3", "slow"), ("llama", "ahead")]
)
def test_protected_intervals_stay_until_they_are_released(family: str, way: str, tiny_model: TinyModel) -> None:
    """Catches intervals that one way of decoding ignores, that a resize forgets, or that outlast their release."""
    engine = make_pinned(tiny_model(family), Pins(), replace(SHAPE, rows=2), fast_path=way == "fast")
    cache = engine._runner.cache
    cache.spans = torch.zeros(len(cache.seen), 2, 2, dtype=torch.int32)
    if way == "ahead":
        engine._runner.run_ahead(frozenset())
    cache.protect(0, (20, 23), (0, 2))
    cache.protect(1, (57, 59))
    wanted = [0, 1, 20, 21, 22]
    run(engine, [greedy("a", PROMPT, 30, keep=True), greedy("b", PROMPT[1:], 30, keep=True)])
    whole = [index for index, window in enumerate(engine.facts.spec.windows) if window is None]
    assert all(set(wanted) <= set(head) for index in whole for head in engine.kept.positions("a")[index])
    assert all({57, 58} <= set(head) for index in whole for head in engine.kept.positions("b")[index])
    retained = engine.kept.retained("a")
    assert retained.survivals()[21] == torch.inf
    assert not {position for position, _ in retained.next_out()} & set(wanted)
    with pytest.raises(UsageError, match="5 tokens are pinned: 5 slots"):
        cache.check_pins(5, [0, 1], beside=5)
    with pytest.raises(UsageError, match="11 pinned tokens leave none"):
        cache.pin(0, [p for p in engine.kept.positions("a")[whole[0]][0] if p not in wanted], beside=5)
    engine._runner.resize(6, [])
    assert all(set(wanted) <= set(head) for index in whole for head in engine.kept.positions("a")[index])
    cache.protect(0)
    run(engine, [greedy("c", PROMPT, 30, keep=True, continues="a")])
    assert any(not set(wanted) <= set(head) for index in whole for head in engine.kept.positions("c")[index])
    assert all({57, 58} <= set(head) for index in whole for head in engine.kept.positions("b")[index])
