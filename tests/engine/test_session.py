"""Rows kept aside: undo, fork, and what a stopped request had not read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from helpers.engines import Shape, greedy, make_engine, run
from trimkv_cli.engine.engine import Engine
from trimkv_cli.request import Request, SamplingParams

TinyModel = Callable[..., Any]
FIRST, SECOND = tuple(range(3, 60)), (7, 99, 12, 64)
SHAPE = Shape(kv_budget=11, rows=1, prefill_chunk=16, gate="random")


def turn(identifier: str, ids: tuple[int, ...], *, continues: str | None = None, seed: int = 3) -> Request:
    params = SamplingParams(max_tokens=13, temperature=1.5, repetition_penalty=1.3, top_p=0.9, seed=seed)
    return Request(id=identifier, prompt_token_ids=ids, params=params, keep=True, continues=continues, context=512)


def say(engine: Engine, request: Request) -> list[int]:
    return run(engine, [request])[request.id]


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3"])
def test_after_undo_the_same_seed_gives_the_same_tokens(family: str, tiny_model: TinyModel) -> None:
    """Catches slots, counts, positions or the unfed last token that a turn leaves behind after it was undone."""
    engine = make_engine(tiny_model(family), SHAPE)
    answer = say(engine, turn("1", FIRST))
    state, kept = engine.kept.save("1"), engine.kept.positions("1")
    straight = say(engine, turn("2", (answer[-1], *SECOND), continues="1"))
    engine.kept.release("2")
    engine.kept.restore(state, "1")
    assert engine.kept.positions("1") == kept
    say(engine, turn("2b", (answer[-1], *FIRST), continues="1", seed=8))
    engine.kept.release("2b")
    engine.kept.restore(state, "1")
    assert engine.kept.retained("1").seen == len(state.token_ids) == len(FIRST) + len(answer) - 1
    assert say(engine, turn("2c", (answer[-1], *SECOND), continues="1")) == straight


def test_branches_of_a_fork_go_on_independently(tiny_model: TinyModel) -> None:
    """Catches branches that share a row, or a copy that aliases the cache's memory."""
    alone = make_engine(tiny_model("qwen3"), SHAPE)
    answer = say(alone, turn("1", FIRST))
    state = alone.kept.save("1")
    want = {}
    for name, ids in (("left", SECOND), ("right", FIRST)):
        if name == "right":
            alone.kept.restore(state, "1")
        want[name] = say(alone, turn(name, (answer[-1], *ids), continues="1"))
        alone.kept.release(name)
    several = make_engine(tiny_model("qwen3"), replace(SHAPE, rows=3))
    for name in want:
        several.kept.restore(state, f"before {name}")
    requests = [
        turn(name, (answer[-1], *ids), continues=f"before {name}") for name, ids in (("left", SECOND), ("right", FIRST))
    ]
    assert run(several, requests) == want


def test_a_state_remembers_what_was_not_read(tiny_model: TinyModel) -> None:
    """Catches the rest of a stopped prompt being lost when its state is saved and restored."""
    shape = Shape(kv_budget=300, rows=1, prefill_chunk=8)
    engine = make_engine(tiny_model("llama"), shape)
    engine.add(greedy("1", FIRST, 5, keep=True))
    assert engine.step() == []
    assert engine.stop("1") is not None
    state = engine.kept.save("1")
    engine.kept.release("1")
    engine.kept.restore(state, "1")
    reply = run(engine, [greedy("2", SECOND, 5, continues="1")])["2"]
    assert run(make_engine(tiny_model("llama"), shape), [greedy("x", FIRST + SECOND, 5)])["x"] == reply


def test_a_state_takes_the_bytes_of_the_slots_in_use(tiny_model: TinyModel) -> None:
    """Catches snapshots that grow with the conversation, or that copy empty slots."""
    engine = make_engine(tiny_model("qwen3"), SHAPE)
    say(engine, turn("1", FIRST))
    assert engine.kept.save("1").nbytes == engine.kv_bytes
    short = make_engine(tiny_model("qwen3"), replace(SHAPE, kv_budget=200))
    say(short, turn("1", FIRST))
    assert short.kept.save("1").nbytes * 200 == short.kv_bytes * short.kept.seen("1")
