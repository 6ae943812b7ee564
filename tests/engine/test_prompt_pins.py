"""Mistakes of pinned ends of prompts: let go too early or too late, another's ends, more than there is room for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from helpers.engines import Shape, greedy, make_engine, run
from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.row_files import read_row, write_row
from trimkv_cli.errors import UsageError
from trimkv_cli.model.pins import Amount, Pins, PromptSpan
from trimkv_cli.model.spec import ModelSpec, streaming_gate
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.plan.plan import make_plan

TinyModel = Callable[..., Any]
SHAPE = Shape(kv_budget=20, rows=1, prefill_chunk=16, gate="random")
PINS = Pins(prompt=Amount(15, is_share=True))  # 3 of 20
PROMPT = tuple(range(3, 61))
Feed = tuple[int, set[int]]  # how many tokens a forward feeds, and what cannot be evicted by it


def forwards(start: int, prompt: int, answer: int, pinned: Sequence[range]) -> Iterator[Feed]:
    """Cut a request as the engine does, the last token of the answer aside: chunks of 16, then single tokens."""
    held = {position for span in pinned for position in span}
    for first, end in pairwise([*range(0, prompt, SHAPE.prefill_chunk), prompt]):
        yield end - first, held
    yield from [(1, held)] * (answer - 1)


def expected(log_beta: Sequence[float], feeds: Sequence[Feed]) -> list[int]:
    """Return what a head holds after all forwards, one token after the other."""
    held: list[int] = []
    seen = 0
    for count, pinned in feeds:
        held += range(seen, seen + count)
        seen += count
        scores = {p: np.inf if p in pinned else np.float32(log_beta[p]) * np.float32(seen + 1 - p) for p in held}
        held = sorted(held, key=lambda p: (-scores[p], p))[: SHAPE.kv_budget]
    return sorted(held)


def assert_held(engine: Engine, name: str, feeds: Sequence[Feed]) -> None:
    full = [at for at, window in enumerate(engine.facts.spec.windows) if window is None]
    traced, kept = engine.traced_log_beta(), engine.kept.positions(name)
    for layer in full:
        for log_beta, head in zip(traced[layer], kept[layer], strict=True):
            assert head == expected(log_beta, feeds)


@pytest.mark.parametrize(("family", "fast_path"), [("qwen3", True), ("qwen3", False), ("gemma3", True)])
def test_turns_hold_what_plain_python_holds(
    family: str, fast_path: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Catches ends that are evicted, that outlive their turn, that a saved state loses or that going on moves."""
    engine = make_engine(tiny_model(family), SHAPE, pins=PINS, fast_path=fast_path)
    engine.start_trace()
    stats = [event.stats for event in engine.generate([greedy("a", PROMPT, 9, keep=True)]) if event.stats]
    assert stats[0].cache.pinned_per_head == 6
    first = list(forwards(0, 58, 9, [range(3), range(55, 58)]))
    assert_held(engine, "a", first)
    # The answer goes on in a state that was saved: the same ends stay.
    identity = {"model_id": "tiny", "fingerprint": engine.fingerprint}
    write_row(tmp_path / "a.kv", engine.kept.save("a"), **identity)
    engine.kept.release("a")
    engine.kept.restore(read_row(tmp_path / "a.kv", **identity), "a")
    assert list(engine.kept.retained("a").pinned().items()) == [(p, p < 3) for p in (0, 1, 2, 55, 56, 57)]
    run(engine, [greedy("b", (7,), 12, keep=True, continues="a", goes_on=True)])
    going_on = [*first, *forwards(66, 1, 12, [range(3), range(55, 58)])]
    assert_held(engine, "b", going_on)
    # The next prompt lets go of them, but for the beginning of the conversation.
    run(engine, [greedy("c", PROMPT[:40], 15, keep=True, continues="b")])
    assert_held(engine, "c", [*going_on, *forwards(78, 40, 15, [range(3), range(78, 81), range(115, 118)])])
    pinned = engine.kept.retained("c").pinned()
    assert [position for position, stays in pinned.items() if stays] == [0, 1, 2]
    assert [position for position, stays in pinned.items() if not stays] == [78, 79, 80, 115, 116, 117]
    engine.kept.release("c")
    engine.kept.restore(read_row(tmp_path / "a.kv", **identity), "undone")
    assert max(engine.kept.retained("undone").pinned()) == 57


@pytest.mark.parametrize("ahead", [False, True])
def test_alone_as_beside_others(ahead: bool, tiny_model: TinyModel) -> None:
    """Catches ends that a shared system message, a copy of a prompt, a free place below or a step ahead leaves behind.

    The second prompt is so short that its end would reach into the system message that others share.
    """
    model = tiny_model("llama")
    pins = Pins(prompt=Amount(6))
    prompts = {"a": PROMPT, "b": PROMPT[:26], "c": PROMPT[:25] + PROMPT[:20], "d": PROMPT, "e": PROMPT[9:]}
    lengths = {"a": 12, "b": 3, "c": 14, "d": 20, "e": 17}

    def held(names: str, rows: int) -> dict[str, Any]:
        with_rows = replace(SHAPE, rows=rows, prefill_chunk=8)
        engine = make_engine(model, with_rows, pins=pins)
        if ahead and rows > 1:
            engine._runner.run_ahead(frozenset())
        requests = [
            greedy(
                name,
                prompts[name],
                lengths[name],
                keep=True,
                prefix_len=0 if name == "e" else 25,
                same_prompt="same" if name in "ad" else None,
            )
            for name in names
        ]
        run(engine, requests)
        found = {name: engine.kept.positions(name) for name in names}
        engine.close()
        return found

    together = held("abcde", 5)
    for name in prompts:
        assert together[name] == held(name, 1)[name], name
    assert all({*range(6), *range(52, 58)} <= set(head) for layer in together["d"] for head in layer)


def test_other_slots_mean_other_ends(tiny_model: TinyModel) -> None:
    """Catches shares of what there was, and pins that fill what there is then."""
    engine = make_engine(tiny_model("qwen3"), SHAPE, pins=PINS)
    run(engine, [greedy("a", PROMPT, 9, keep=True)])
    saved = engine.kept.save("a")
    engine.resize(14)
    assert list(engine.kept.retained("a").pinned()) == [0, 1, 2, 56, 57]
    held = engine.kept.positions("a")
    engine.kept.release("a")
    engine.kept.restore(engine.kept.fitted(saved), "a")
    assert engine.kept.positions("a") == held
    run(engine, [greedy("b", PROMPT[:40], 20, keep=True, continues="a")])
    ends = {0, 1, 2, 66, 67, 104, 105}
    assert all(ends <= set(head) for layer in engine.kept.positions("b") for head in layer)
    with pytest.raises(UsageError, match="leave none of 14 slots"):
        engine.kept.pin("b", range(200))
    with pytest.raises(UsageError, match="5 tokens are pinned: 5 slots per head leave none"):
        engine.resize(5)
    with pytest.raises(UsageError, match=r"2 pinned tokens \(1 at each end of the prompt\) leave none of 2 slots"):
        engine.resize(2)


def test_a_single_prompt_has_two_ends(tiny_model: TinyModel) -> None:
    """Catches a third end counted for who asks once, and one forgotten where turns follow."""
    pins = Pins(prompt=Amount(40, is_share=True))  # 8 of 20
    engine = make_engine(tiny_model("qwen3"), SHAPE, pins=pins)
    stats = [event.stats for event in engine.generate([greedy("a", PROMPT, 9, keep=True)]) if event.stats]
    assert stats[0].cache.pinned_per_head == 16
    ends = {*range(8), *range(50, 58)}
    assert all(ends <= set(head) for layer in engine.kept.positions("a") for head in layer)
    run(engine, [greedy("b", (7,), 5, keep=True, continues="a", goes_on=True)])
    with pytest.raises(UsageError, match="24 pinned tokens") as refused:
        engine.check(greedy("c", PROMPT, 9, continues="b"))
    said = "8 at the first prompt's beginning and the ends of the newest"
    assert refused.value.message == f"24 pinned tokens ({said}) leave none of 20 slots per head to the others"
    assert refused.value.hint == "pin less: --pin prompt:10% takes 30% in a conversation"
    with pytest.raises(UsageError, match="none of 20 slots"):  # a turn may follow
        engine.kept.pin("b", [9])
    alone = make_engine(tiny_model("qwen3"), SHAPE, pins=Pins(prompt=Amount(4)))
    alone.add(greedy("a", PROMPT, 9))
    alone.step()
    alone.resize(9)  # 8 are pinned: no turn follows


def test_a_prompt_that_fails_leaves_the_ends_of_the_one_before(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a conversation that a request without memory robs of its ends."""
    engine = make_engine(tiny_model("qwen3"), SHAPE, pins=PINS)
    run(engine, [greedy("a", PROMPT, 9, keep=True)])
    before = engine.kept.positions("a"), engine.kept.retained("a").pinned()
    with monkeypatch.context() as patched:
        patched.setattr(engine._runner, "_forward", Mock(side_effect=MemoryError))
        events = list(engine.generate([greedy("b", PROMPT, 9, keep=True, continues="a")]))
    assert events[-1].error_code == "out_of_memory"
    assert (engine.kept.positions("a"), engine.kept.retained("a").pinned()) == before


def test_no_more_is_held_than_was_counted() -> None:
    """Catches a check that lets through what fills all slots, and intervals outside of the prompt."""
    for pins in (Pins(prompt=Amount(3)), Pins(prompt=Amount(3), system=True, sinks=2, recent=2)):
        for start in (0, 9, 30):
            for length in range(1, 12):
                prompt = PromptSpan(
                    start,
                    start + length,
                    first=length if start == 0 else 9,
                    system=min(4, length),
                    shared=min(5, length),
                )
                for now, end in pins.for_now(prompt, 20):
                    assert start <= now
                    assert end <= start + length
                for seen in range(start, start + length + 5):
                    assert pins.held(prompt, seen, 20) <= pins.count(5, 20, turns=start > 0)
    assert [PINS.ends(slots) for slots in (1, 6, 7, 13, 14, 1000)] == [1, 1, 1, 1, 2, 150]


def test_a_plan_says_what_is_pinned_and_what_that_leaves(tiny_model: TinyModel) -> None:
    """Catches pins that are refused once weights are loaded, and offers of a cache that they fill."""
    spec, gate = ModelSpec.from_config(tiny_model("qwen3").config.to_dict()), streaming_gate()
    pins = Pins.parse("system,prompt:10%,recent:8")
    plan = make_plan(spec, gate, PlanOptions(kv_budget=128, pins=pins))
    pinned = "pinned tokens: the system message, the newest 8, 12 at each end of a prompt"
    left = "at least 96 of 128 slots are left beside a system message, and 84 in a conversation"
    assert f"{pinned}; {left}" in plan.choices
    with pytest.raises(UsageError, match=r"40 pinned tokens \(20 at each end of the prompt\)") as refused:
        make_plan(spec, gate, PlanOptions(kv_budget=40, pins=Pins.parse("prompt:50%")))
    assert refused.value.hint == "pin less: --pin prompt:10% takes 20% at most"
    shares = PlanOptions(kv_budget=40, pins=Pins.parse("prompt:35%"))
    assert make_plan(spec, gate, shares).run.most_pinned == 28
    with pytest.raises(UsageError, match="42 pinned tokens"):
        make_plan(spec, gate, replace(shares, snapshots=2))
    numbers = PlanOptions(kv_budget=40, pins=Pins.parse("prompt:14"), snapshots=2)
    with pytest.raises(UsageError, match="42 pinned") as refused:
        make_plan(spec, gate, numbers)
    assert refused.value.hint == "--kv-budget 84, or pin less"
    smallest = make_plan(spec, gate, PlanOptions(budget=1, pins=Pins.parse("prompt:30"), snapshots=2))
    sizes = [int(offer.split("--kv-budget ")[1].split()[0]) for offer in smallest.offers if "--kv-budget" in offer]
    assert sizes
    assert min(sizes) > 90
    assert all("--pin prompt:30" in offer for offer in smallest.offers)
