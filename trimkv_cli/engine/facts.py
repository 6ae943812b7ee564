"""What stays the same while an engine lives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from trimkv_cli.engine.devices import module_bytes
from trimkv_cli.events import Notice
from trimkv_cli.model.pins import Pins
from trimkv_cli.model.spec import GateSpec, ModelSpec
from trimkv_cli.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What stays the same while an engine lives, and what its callers may want to know of it."""

    model_id: str
    plan: Plan
    weight_bytes: int
    gate_bytes: int
    max_positions: int
    eos_token_ids: frozenset[int] = frozenset()
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what the user did not ask for but may like to know
    warnings: tuple[Notice, ...] = ()
    load_s: float = 0.0

    @classmethod
    def of(cls, model: nn.Module, gates: Iterable[nn.Module], *, plan: Plan, **others: Any) -> EngineFacts:
        """Count the bytes of what was loaded; without `max_positions` a model has its own."""
        sizes = {"weight_bytes": module_bytes(model), "gate_bytes": module_bytes(nn.ModuleList(gates))}
        return cls(plan=plan, **{"max_positions": plan.run.spec.max_positions, **sizes, **others})

    @property
    def spec(self) -> ModelSpec:
        return self.plan.run.spec

    @property
    def gate(self) -> GateSpec:
        return self.plan.run.gate

    @property
    def pins(self) -> Pins:
        return self.plan.run.pins
