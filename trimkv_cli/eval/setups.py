"""The policies at their budgets: planned together, each with its gates and its pins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import assert_never

import torch
from torch import Tensor, nn

from trimkv_cli.cache.gates import build_gates
from trimkv_cli.cache.retention_gate import RetentionGate
from trimkv_cli.engine.devices import pick_device
from trimkv_cli.errors import DoesNotFit, UsageError
from trimkv_cli.eval.exam import EvalOptions, Exam
from trimkv_cli.eval.scoring import Policy
from trimkv_cli.loading.loader import Parts, plan_for
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import Source
from trimkv_cli.model.pins import Amount, Pins
from trimkv_cli.model.spec import GateSpec, full_gate, keydiff_gate, streaming_gate
from trimkv_cli.plan.plan import Plan

_PREFILL_TOKENS = 256  # rows × chunk of one prefill: small chunks of several rows go together
_ROWS = 32  # several documents, with all that is asked about each
_ROW_SLOTS = 32 * 1024  # of all rows of a full cache
_LEAST_PART = 64  # tokens of a text that map-reduce reads at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One policy at one budget, planned."""

    policy: Policy
    plan: Plan

    @property
    def slots(self) -> int:
        return self.plan.run.kv_budget

    def asks(self, exam: Exam) -> bool:
        """Say whether the policy can answer these questions; what reads in parts can only summarize."""
        return self.policy != "map-reduce" or exam.summarizes

    def __str__(self) -> str:
        return self.policy if self.policy == "full" else f"{self.policy} M={self.slots}"


def plan_setups(
    source: Source, engine: EngineOptions, asked: EvalOptions, exams: Sequence[Exam], positions: int
) -> tuple[EngineOptions, list[Setup]]:
    """Plan every policy at every budget, with weights in one form; return the options to load with, and the plans.

    Rows that nobody asked for are as many as memory holds. Left out is map-reduce where a part and its summary have
    no room.

    Raises:
        DoesNotFit: one of the caches.
        UsageError: map-reduce without a text to summarize, or without a budget that has room.
    """
    # Without a limit on all memory, several rows' chunks go through the model together; the plan counts that.
    wide = engine.budget is None and asked.prefill_chunk > 0 and not engine.deterministic
    tokens = max(asked.prefill_chunk, _PREFILL_TOKENS) if wide else asked.prefill_chunk
    options = replace(engine, context=None, kv_budget=None, prefill_chunk=tokens)
    rows = None
    if engine.budget is None and engine.max_inflight is None and not engine.deterministic:
        rows = max(1, min(_ROWS, _ROW_SLOTS // positions)) if exams else 1  # a text is read alone
    while True:
        options = replace(options, max_inflight=rows or engine.max_inflight)
        try:
            loaded, setups = _planned(source, options, asked, positions)
        except DoesNotFit:
            if rows is None or rows == 1:
                raise
            rows //= 2
        else:
            return loaded, _with_room(setups, exams)


def _planned(
    source: Source, options: EngineOptions, asked: EvalOptions, positions: int
) -> tuple[EngineOptions, list[Setup]]:
    largest = max(_setups(source, options, asked, positions), key=lambda setup: setup.slots).plan.run
    options = replace(options, dtype=largest.dtype, quantize=largest.quantize, kv_budget=str(largest.kv_budget))
    return options, _setups(source, options, asked, positions)


def _with_room(setups: list[Setup], exams: Sequence[Exam]) -> list[Setup]:
    if all(setup.policy != "map-reduce" for setup in setups):
        return setups
    summaries = [q for exam in exams if exam.summarizes for q in exam.samples]
    if not summaries:
        raise UsageError("map-reduce answers nothing but summary-recall", hint="--tasks summary-recall")
    least = max(q.frame_len + q.request.params.max_tokens for q in summaries) + _LEAST_PART - 1
    left = [setup for setup in setups if setup.policy != "map-reduce" or setup.slots >= least]
    if all(setup.policy != "map-reduce" for setup in left):
        raise UsageError(
            f"map-reduce needs {least:,} slots for a part of the text and its summary",
            hint=f"--budgets {least}, or fewer --max-tokens",
        )
    return left


def _setups(source: Source, options: EngineOptions, asked: EvalOptions, positions: int) -> list[Setup]:
    device = pick_device(options.device)
    wanted = [
        (policy, budget)
        for policy in asked.policies
        for budget in ((str(positions),) if policy == "full" else asked.budgets)
    ]
    return [
        Setup(
            policy=policy,
            plan=plan_for(
                replace(source, gate=gate_spec(policy, source.gate)),
                replace(options, kv_budget=budget, pin=_pin(policy, options.pin)),
                device,
            ),
        )
        for policy, budget in wanted
    ]


def _pin(policy: Policy, asked: str | None) -> str | None:
    """Return what is pinned: as asked for under every policy, and a tenth of the slots at each end if protected."""
    if policy != "protected":
        return asked or "none"  # what a scorer pins by default would set it apart
    pins = Pins.parse(asked)
    return str(replace(pins, prompt=pins.prompt or Amount(10, is_share=True)))


def check_pins(setups: list[Setup], exams: list[Exam]) -> None:
    """Refuse pins that leave no slot before a weight is read."""
    longest = max((q.request.prefix_len for exam in exams for q in exam.samples), default=0)
    for setup in setups:
        run = setup.plan.run
        run.pins.check(longest, run.kv_budget, sinks=run.gate.kept)


class RandomGate(RetentionGate):
    """Value each position by chance, each layer and head in its own way: log_beta uniform in (−1, 0).

    Scores age as they do under every gate: the latest tokens stay for sure, of the older ones a random choice.
    """

    def __init__(self, *, num_kv_heads: int, positions: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Buffer(-torch.rand(positions, num_kv_heads, generator=generator))

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        return self.table[positions.clamp(min=0).long()]


def gate_spec(policy: Policy, trained: GateSpec) -> GateSpec:
    """Describe a policy's gate as the plan wants it."""
    match policy:
        case "full" | "map-reduce":
            return full_gate()
        case "gates" | "static":
            return trained
        case "keydiff":
            return keydiff_gate()
        case "streaming" | "protected":
            return streaming_gate()
        case "random":
            return GateSpec(variant="streaming", id="random", sinks=0)  # a constant gate: it has no weights
        case _:
            assert_never(policy)


def policy_gates(policy: Policy, parts: Parts, *, positions: int, seed: int) -> Sequence[nn.Module]:
    """Return one gate per layer, for sequences of at most `positions` tokens."""
    spec, device = parts.facts.spec, parts.model.device
    if policy in ("gates", "static"):
        return parts.gates
    if policy == "random":
        return [
            RandomGate(num_kv_heads=spec.num_kv_heads, positions=positions, seed=seed * spec.num_layers + layer).to(
                device
            )
            for layer in range(spec.num_kv_layers)
        ]
    return list(build_gates(gate_spec(policy, parts.facts.gate), spec, {}, dtype=torch.float32, device=device))
