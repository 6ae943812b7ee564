"""What each kind of scorer protects where nobody says."""

from __future__ import annotations

import pytest

from trimkv_cli.model.default_pins import DEFAULT_PINS, default_pins
from trimkv_cli.model.pins import Pins
from trimkv_cli.model.profiles import load_profile
from trimkv_cli.model.spec import GateSpec, ModelSpec, full_gate, keydiff_gate, streaming_gate
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.plan.plan import make_plan

SPEC = ModelSpec.from_config(load_profile("qwen3-4b-math").config)


@pytest.mark.parametrize(
    ("variant", "slots", "context", "expected"),
    [
        ("kvzap", 1024, 500, "recent:128"),
        ("kvzap", 256, 500, "recent:128"),
        ("kvzap", 100, 500, "recent:50"),
        ("fastkvzip", 1024, 1000, "sinks:4,recent:20"),
        ("fastkvzip", 1024, 10, "sinks:4,recent:1"),
        ("fastkvzip", 16384, 31999, "sinks:4,recent:639"),
        ("fastkvzip", 16384, 32000, "sinks:4,recent:4096"),
        ("fastkvzip", 1024, 32000, "sinks:4,recent:508"),
        ("fastkvzip", 8, 32000, "sinks:2,recent:2"),
        ("kvzap", 1, 500, ""),
    ],
)
def test_half_of_the_slots_at_most_are_protected(variant: str, slots: int, context: int, expected: str) -> None:
    """Catches a window that leaves no slot to what is scored, and a reduction that nobody is told of."""
    pins, notices = default_pins(GateSpec(variant=variant, id="theirs"), slots=slots, context=context)
    assert str(pins) == expected
    assert [notice.code for notice in notices] == (
        ["pins_reduced"] if pins.recent < DEFAULT_PINS[variant].recent(context) else []
    )


def test_other_scorers_keep_a_short_system_message() -> None:
    """Catches instructions that are forgotten by default, and a full cache that says it pins some."""
    for gate in (streaming_gate(), keydiff_gate(), GateSpec(variant="rg", id="ours")):
        pins, notices = default_pins(gate, slots=64, context=100)
        assert (str(pins), pins.system_most(64), notices) == ("system:25%", 16, ())
    assert default_pins(full_gate(), slots=64, context=4096) == (Pins(), ())


@pytest.mark.parametrize(
    ("asked", "expected"), [(None, "recent:32"), ("none", ""), ("sinks:2", "sinks:2"), ("recent:63", "recent:63")]
)
def test_what_is_asked_for_is_all_that_is_pinned(asked: str | None, expected: str) -> None:
    """Catches pins that a user cannot turn off, and defaults that are added to what was asked for."""
    gate = GateSpec(variant="kvzap", id="theirs", hidden=8)
    options = PlanOptions(kv_budget=64, pins=None if asked is None else Pins.parse(asked))
    plan = make_plan(SPEC, gate, options)
    assert str(plan.run.pins) == expected
    assert [notice.code for notice in plan.warnings] == (["pins_reduced"] if asked is None else [])
    assert any("pinned tokens" in choice for choice in plan.choices) == bool(expected)
    if asked is None:
        assert plan.resized(48, limit=None).run.pins == plan.run.pins  # of which a cache in use knows
