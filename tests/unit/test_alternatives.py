"""What else a budget holds: the most of one size, and every precision beside the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trimkv_cli.errors import UsageError
from trimkv_cli.model.profiles import load_profile
from trimkv_cli.model.spec import full_gate
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.plan.compare import alternatives, solve_for
from trimkv_cli.plan.plan import make_plan

PROFILE: Any = load_profile("qwen3-4b-math")
SPEC, GATE = PROFILE.spec, PROFILE.gate
OPTIONS = PlanOptions(budget=12 * 2**30, device="cuda")


@pytest.mark.parametrize("unknown", ["rows", "kv-budget", "context"])
def test_the_most_fits_and_one_more_does_not(unknown: str) -> None:
    """Catches a value that is one too large, or far too small."""
    gate = full_gate() if unknown == "context" else GATE
    solved = solve_for(unknown, SPEC, gate, OPTIONS)
    assert solved.plan.fits
    assert solved.plan.run.total_bytes <= 12 * 2**30
    fixed = replace(OPTIONS, max_inflight=1, dtype="bf16", quantize="none", prefill_chunk=512, kv_budget=512)
    more = {
        "rows": replace(fixed, max_inflight=solved.value + 1),
        "kv-budget": replace(fixed, kv_budget=solved.value + 1),
        "context": replace(fixed, kv_budget=None, context=solved.value + 1),
    }[unknown]
    assert not make_plan(SPEC, gate, more).fits


def test_precision_buys_slots_and_rows() -> None:
    """Catches a comparison whose lines are all the same plan."""
    found = {(each.quantize, each.kv_dtype): each for each in alternatives(SPEC, GATE, OPTIONS)}
    assert len(found) == 6
    for kv_dtype in ("bf16", "fp8"):
        sizes = [found[level, kv_dtype].bytes for level in ("none", "int8", "nf4")]
        assert sizes == sorted(sizes, reverse=True)
    for level in ("none", "int8", "nf4"):
        assert found[level, "fp8"].rows > found[level, "bf16"].rows


def test_what_has_no_answer_is_refused() -> None:
    """Catches a number for a size that nothing depends on."""
    with pytest.raises(UsageError, match="needs a budget"):
        solve_for("rows", SPEC, GATE, replace(OPTIONS, budget=None))
    with pytest.raises(UsageError, match="however long"):
        solve_for("context", SPEC, GATE, OPTIONS)
    with pytest.raises(UsageError, match="not a size"):
        solve_for("speed", SPEC, GATE, OPTIONS)
