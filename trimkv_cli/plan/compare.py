"""What else a budget would hold: the most of one size, and every precision beside the others. Plain Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from trimkv_cli.errors import ContextOverflow, UsageError
from trimkv_cli.model.spec import GateSpec, KvDtype, ModelSpec, Quantisation, full_gate
from trimkv_cli.plan.choices import PlanOptions, forms_of, knows_eight_bits, largest
from trimkv_cli.plan.plan import Plan, make_plan

Unknown = Literal["kv-budget", "rows", "context"]
UNKNOWNS: tuple[Unknown, ...] = ("kv-budget", "rows", "context")
_MOST_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """The largest value of one size with which a plan still fits; 0 when none does."""

    unknown: Unknown
    value: int
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """What a budget holds with weights and cache of one precision; 0 where not even one fits."""

    weights: str
    quantize: Quantisation
    kv_dtype: KvDtype
    bytes: int  # of one sequence with the slots that are planned
    rows: int  # with the slots that are planned
    kv_budget: int  # slots per head of one sequence alone
    full_context: int  # tokens of one sequence in a cache that evicts nothing


def solve_for(unknown: str, spec: ModelSpec, gate: GateSpec, options: PlanOptions) -> Solved:
    """Find the most slots of one sequence, the most rows, or the longest context of a full cache that fit.

    Raises:
        UsageError: no budget, or a size that the cache does not depend on.
    """
    known = next((name for name in UNKNOWNS if name == unknown), None)
    if known is None:
        raise UsageError(f"--solve {unknown} is not a size", hint=f"one of {', '.join(UNKNOWNS)}")
    if options.budget is None:
        raise UsageError(f"--solve {unknown} needs a budget", hint=f"--budget 8GiB --solve {unknown}")
    if known == "context" and gate.variant != "none":
        raise UsageError(
            f"with these gates a sequence costs the same however long it is: up to {spec.max_positions} tokens",
            hint="--solve context is for a full cache: --gates none",
        )
    first = make_plan(spec, gate, options).run  # its precision and chunk stay
    fixed = replace(
        options,
        dtype=first.dtype,
        quantize=first.quantize,
        prefill_chunk=first.prefill_chunk,
        max_inflight=options.max_inflight or 1,
        kv_budget=first.kv_budget,
    )
    most = _MOST_ROWS if known == "rows" else spec.max_positions
    value = largest(most, lambda n: _fits(spec, gate, _changed(fixed, known, n)))
    return Solved(unknown=known, value=value, plan=make_plan(spec, gate, _changed(fixed, known, max(1, value))))


def _changed(fixed: PlanOptions, unknown: Unknown, value: int) -> PlanOptions:
    if unknown == "rows":
        return replace(fixed, max_inflight=value)
    return replace(fixed, kv_budget=value) if unknown == "kv-budget" else replace(fixed, kv_budget=None, context=value)


def alternatives(spec: ModelSpec, gate: GateSpec, options: PlanOptions) -> Iterator[Alternative]:
    """Yield what the budget holds in each precision of weights and cache that the device knows.

    Raises:
        UsageError: no budget.
    """
    if options.budget is None:
        raise UsageError("--compare needs a budget", hint="--budget 8GiB --compare")
    slots = make_plan(spec, gate, options).run.kv_budget
    packed = spec.quantised is not None and not spec.quantised.unpacks
    dtypes = (spec.dtype,) if packed or options.device != "cpu" else ("fp32", spec.dtype)
    for quantize in forms_of(spec, options):
        for dtype in dict.fromkeys(dtypes):
            for kv_dtype in _kv_dtypes(options, dtype):
                asked = replace(options, dtype=dtype, quantize=quantize, kv_dtype=kv_dtype, kv_budget=slots)
                yield _alternative(spec, gate, replace(asked, prefill_chunk=asked.prefill_chunk or 512), dtype, slots)


def _alternative(spec: ModelSpec, gate: GateSpec, asked: PlanOptions, dtype: str, slots: int) -> Alternative:
    one = replace(asked, max_inflight=1)
    run = make_plan(spec, gate, one).run
    full = replace(one, kv_budget=None)
    return Alternative(
        weights=dtype if run.form == "none" else f"{run.precision} ({dtype})",
        quantize=run.quantize,
        kv_dtype=run.kv_dtype,
        bytes=run.total_bytes,
        rows=largest(_MOST_ROWS, lambda n: _fits(spec, gate, replace(asked, max_inflight=n, kv_budget=slots))),
        kv_budget=largest(spec.max_positions, lambda n: _fits(spec, gate, replace(one, kv_budget=n))),
        full_context=largest(spec.max_positions, lambda n: _fits(spec, full_gate(), replace(full, context=n))),
    )


def _kv_dtypes(options: PlanOptions, dtype: str) -> tuple[str, ...]:
    if options.kv_dtype != "auto":
        return (options.kv_dtype,)
    if options.device == "cuda":
        return (dtype, "fp8") if knows_eight_bits(options) else (dtype,)
    return tuple(dict.fromkeys((dtype, "bf16")))


def _fits(spec: ModelSpec, gate: GateSpec, options: PlanOptions) -> bool:
    try:
        return make_plan(spec, gate, replace(options, offers=False)).fits
    except ContextOverflow:
        return False
