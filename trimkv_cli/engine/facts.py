"""What is fixed about an engine once it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimkv_cli.events import Notice
from trimkv_cli.model.spec import GateSpec, ModelSpec, Pins
from trimkv_cli.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What stays the same while an engine lives, and what its callers may want to know of it."""

    model_id: str
    spec: ModelSpec
    gate: GateSpec
    plan: Plan
    max_positions: int
    eos_token_ids: frozenset[int]
    sampling_defaults: Mapping[str, Any]
    notes: tuple[str, ...]  # what the user did not ask for but may like to know
    warnings: tuple[Notice, ...]
    weight_bytes: int
    gate_bytes: int
    load_s: float
    pins: Pins = field(default_factory=Pins)
