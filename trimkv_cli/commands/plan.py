"""`trimkv plan`: whether a budget will do, before a weight is read or downloaded."""

from __future__ import annotations

import json as jsonlib
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from trimkv_cli.commands.options import (
    Budget,
    Context,
    Gates,
    Json,
    KvBudget,
    Model,
    Offline,
    Revision,
    option,
)

if TYPE_CHECKING:
    from trimkv_cli.plan import Plan


def plan(
    name: Annotated[str | None, typer.Argument(help="Profile name, hub id or folder.", metavar="[MODEL]")] = None,
    *,
    model: Model = None,
    revision: Revision = None,
    gates: Gates = "auto",
    dtype: Annotated[str, option("dtype")] = "auto",
    kv_dtype: Annotated[str, typer.Option("--kv-dtype", help="dtype of the cache; auto = as the weights.")] = "auto",
    device: Annotated[str, option("device")] = "auto",
    offline: Offline = False,
    budget: Budget = None,
    kv_budget: KvBudget = None,
    prefill_chunk: Annotated[int | None, option("prefill_chunk")] = None,
    max_inflight: Annotated[
        int | None,
        typer.Option("--max-inflight", "--rows", help="Sequences that run at the same time.", metavar="N"),
    ] = None,
    context: Context = None,
    json: Json = False,
) -> None:
    """Say whether a budget will do: every part in bytes, and commands that would fit where it does not (exit 4).

    trimkv plan qwen3-4b-math --budget 10GiB
    """
    from trimkv_cli.commands.plan_sources import find_gate, find_model, local_device, machine_bytes
    from trimkv_cli.plan import PlanOptions, make_plan
    from trimkv_cli.ui.plain import AnswerWriter
    from trimkv_cli.units import parse_budget, parse_kv_budget

    asked = name or model  # a configured default gives way to the argument
    found = find_model(asked, revision, offline=offline)
    gate = find_gate(gates, found, offline=offline)
    kind = local_device(device)
    total, free = machine_bytes(kind)
    options = PlanOptions(
        budget=parse_budget(budget).resolve(total_bytes=total, free_bytes=free) if budget else None,
        kv_budget=parse_kv_budget(kv_budget) if kv_budget else None,
        default_kv_budget=found.kv_budget if gates == "auto" else None,
        prefill_chunk=found.prefill_chunk if prefill_chunk is None else prefill_chunk,
        max_inflight=max_inflight,
        context=context,
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=kind,
        command=_command(asked, revision=revision, gates=gates, device=device, offline=offline),
    )
    made = make_plan(found.spec, gate, options)
    answer = AnswerWriter()
    shown = context or found.spec.max_positions
    answer.push(_as_json(made, found.id, shown) if json else _as_text(made, found.id, shown))
    answer.close()
    made.ensure_fits()


def _command(model: str | None, *, revision: str | None, gates: str, device: str, offline: bool) -> str:
    """Begin the counter-offers as this command was begun."""
    words = ["trimkv", "plan", *([model] if model else [])]
    words += ["--revision", revision] if revision else []
    words += ["--gates", gates] if gates != "auto" else []
    words += ["--device", device] if device != "auto" else []
    return shlex.join([*words, *(["--offline"] if offline else [])])


def _as_json(plan: Plan, model: str, context: int) -> str:
    return jsonlib.dumps(
        {
            "fits": plan.fits,
            "model": model,
            "gates": {"id": plan.gate.id, "trained_memory_size": plan.gate.memory_size},
            "device": plan.device,
            "dtype": plan.dtype,
            "kv_dtype": plan.kv_dtype,
            "kv_budget": plan.kv_budget,
            "rows": plan.rows,
            "prefill_chunk": plan.prefill_chunk,
            "parts": [asdict(part) for part in plan.parts],
            "total_bytes": plan.total_bytes,
            "budget_bytes": plan.budget_bytes,
            "kv_bytes_per_sequence": plan.kv_bytes_per_row,
            "full_cache": {"context": context, "bytes": plan.full_cache_bytes(context)},
            "choices": list(plan.choices),
            "warnings": [asdict(warning) for warning in plan.warnings],
            "offers": list(plan.offers),
        },
        indent=2,
    )


def _as_text(plan: Plan, model: str, context: int) -> str:
    from trimkv_cli.ui.tables import columns
    from trimkv_cli.units import format_size

    lines = [(label, format_size(size_bytes), note) for label, size_bytes, note in _rows(plan, context)]
    width = max(len(size) for _, size, _ in lines)
    table = columns([(label, size.rjust(width), note) for label, size, note in lines])
    return "\n".join([f"{model} with {plan.gate.id}", *(line.rstrip() for line in table), "", *_remarks(plan)])


def _rows(plan: Plan, context: int) -> Iterator[tuple[str, int, str]]:
    notes = {
        "weights": plan.dtype,
        "gates": plan.gate.variant,
        "kv": f"{plan.rows} × {plan.kv_budget} slots per head, {plan.kv_dtype}",
        "shared_prefix": "one more sequence, to share a system message",
        "workspace": f"one chunk of {plan.prefill_chunk or context} prompt tokens, and sampling",
        "loading": f"while {plan.spec.dtype} weights become {plan.dtype}",
        "runtime": "torch and transformers" if plan.device == "cpu" else f"{plan.device} context",
    }
    for part in (part for part in plan.parts if part.bytes):
        yield part.name.replace("_", " "), part.bytes, notes.get(part.name, "")
    yield "total", plan.total_bytes, "" if plan.budget_bytes is None else "fits" if plan.fits else "does not fit"
    if plan.budget_bytes is not None:
        yield "budget", plan.budget_bytes, ""
    yield "full cache", plan.full_cache_bytes(context), f"for comparison: one sequence of {context} tokens"


def _remarks(plan: Plan) -> Iterator[str]:
    yield from plan.choices
    said_as_choice = ("kv_budget_reduced", "prefill_chunk_reduced", "dtype_reduced")
    yield from (f"warning: {warning.message}" for warning in plan.warnings if warning.code not in said_as_choice)
    if plan.offers:
        yield "this would fit:"
        yield from (f"  {offer}" for offer in plan.offers)
