"""The table of budgets in profiles/README.md, and hand arithmetic beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.plan_table import PLACE, table
from trimkv_cli.model.profiles import load_profile
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.plan.plan import make_plan


def test_the_page_is_what_the_plan_says_today() -> None:
    """Catches a table that nobody generated anew after the plan had changed."""
    assert (Path(__file__).parents[2] / PLACE).read_text(encoding="utf-8") == table()


def test_qwen3_4b_by_hand() -> None:
    """Catches an error that table and plan share: 36 layers of 8 heads of 128, K and V in bf16, 8 bytes of state."""
    keys_and_values, state = 36 * 8 * 2 * 128 * 2, 36 * 8 * 8
    assert (keys_and_values, state) == (147_456, 2_304)
    profile: Any = load_profile("qwen3-4b-math")
    plan = make_plan(profile.spec, profile.gate, PlanOptions(budget=12 * 2**30, device="cuda"))
    rows, slots = plan.run.rows, 512
    assert plan.run.part_bytes("kv") == rows * slots * 149_760
    assert plan.run.part_bytes("shared_prefix") == slots * 149_760
    assert plan.run.part_bytes("weights") == 4_022_468_096 * 2
    gate = 36 * ((2560 * 512 + 512 + 512 * 8) * 2 + 8 * 4)
    assert plan.run.part_bytes("gates") == gate
