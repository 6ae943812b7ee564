"""`trimkv plan`: every byte of a run, before a weight is read or downloaded."""

from __future__ import annotations

import json as jsonlib
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from trimkv_cli.commands.options import JSON, ModelName
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.settings import option

if TYPE_CHECKING:
    from trimkv_cli.model.driver import Gpu
    from trimkv_cli.plan.compare import Alternative, Solved
    from trimkv_cli.plan.plan import Plan
    from trimkv_cli.plan.run import Run


def plan(
    name: ModelName = None,
    *,
    solve: str | None = option(None, "Say the most of this size that fits.", "kv-budget|rows|context"),
    compare: bool = option(False, "Show what the budget holds in each precision of weights and cache."),
    json: bool = JSON,
    engine: EngineOptions,
) -> None:
    """Say whether a budget will do: every part in bytes, and commands that would fit where it does not (exit 4).

    A budget costs rows first, then slots beyond what the gates were trained for, then precision (bf16, int8, int4 on a
    CPU, nf4 on a GPU), then the prefill chunk, which changes results, and last slots that the gates were trained for;
    each is said.

    trimkv plan qwen3-4b-math --budget 10GiB

    trimkv plan qwen3-8b-math --budget 8GiB --device cuda --solve rows

    trimkv plan qwen3-4b-math --budget 12GiB --device cuda --compare
    """
    from trimkv_cli.loading.options import DETERMINISTIC_ROWS
    from trimkv_cli.loading.sources import find_source
    from trimkv_cli.plan.compare import alternatives, solve_for
    from trimkv_cli.plan.plan import make_plan
    from trimkv_cli.ui.plain import print_answer, print_note, print_warning

    asked = replace(engine, model=name or engine.model)  # a configured default gives way to the argument
    found = find_source(asked, weights=False)
    kind, index = _local_device(asked.device)
    gpu = _gpu(index) if kind == "cuda" else None
    memory = _machine_bytes(kind) if gpu is None else (gpu.total_bytes, gpu.free_bytes)
    padded = DETERMINISTIC_ROWS if asked.deterministic else 0
    options = found.plan_options(asked, device=kind, memory_bytes=memory, padded_rows=padded)
    options = replace(options, command=_command(found.name or found.model_id, asked))
    if gpu is not None:
        options = replace(options, machine=replace(options.machine, cuda_capability=gpu.capability))
    solved = solve_for(solve, found.spec, found.gate, options) if solve is not None else None
    others = list(alternatives(found.spec, found.gate, options)) if compare else None
    made = solved.plan if solved is not None else make_plan(found.spec, found.gate, options)
    shown = asked.context or found.spec.max_positions
    if json:
        more: dict[str, Any] = {} if solved is None else {"solved": {"unknown": solved.unknown, "value": solved.value}}
        more |= {} if others is None else {"compare": [asdict(each) for each in others]}
        text = _as_json(made, found.model_id, shown, requested=asked.budget, more=more)
    else:
        text = _as_text(made, found.model_id, shown)
        text += "" if solved is None else f"\n{_say_solved(solved)}"
        text += "" if others is None else "\n\n" + _say_alternatives(others, made.run.kv_budget)
    for note in found.notes:
        print_note(note)
    for warning in found.warnings:
        print_warning(warning.message)
    print_answer(text)
    made.ensure_fits()


def _command(model: str, options: EngineOptions) -> str:
    """Begin the counter-offers as this command was begun."""
    said = {"--revision": options.revision, "--gates": options.gates, "--device": options.device}
    words = ["trimkv", "plan", model]
    words += [word for flag, value in said.items() if value not in (None, "auto") for word in (flag, str(value))]
    return shlex.join([*words, *(["--offline"] if options.offline else [])])


def _local_device(name: str) -> tuple[str, int]:
    """Return the kind of device to plan for, and which; auto is a GPU where NVIDIA's driver is loaded, else the CPU."""
    if name == "auto":
        from trimkv_cli.model.driver import has_driver

        return ("cuda" if has_driver() else "cpu"), 0
    kind, _, index = name.partition(":")
    return kind, int(index or 0)


def _gpu(index: int) -> Gpu | None:
    """Return a GPU of this machine; one that is not here can be planned for, which is said."""
    from trimkv_cli.model.driver import gpus_here
    from trimkv_cli.ui.plain import print_note

    here = gpus_here()
    if index < len(here):
        return here[index]
    named = "; ".join(f"cuda:{place}, {gpu.name}" for place, gpu in enumerate(here)) or "no GPU that can be asked"
    print_note(f"there is no cuda:{index} here ({named}): the plan is compared with no GPU's memory")
    return None


def _machine_bytes(kind: str) -> tuple[int | None, int | None]:
    """Return this machine's memory, all and free."""
    if kind != "cpu" or not hasattr(os, "sysconf"):
        return None, None
    from trimkv_cli.model.machine import memory_bytes

    return memory_bytes()


def _say_solved(solved: Solved) -> str:
    most = {"rows": "sequences at a time", "kv-budget": "slots per head", "context": "tokens of context"}
    if solved.value == 0:
        return f"not even 1 of {most[solved.unknown]} fits"
    return f"up to {solved.value:,} {most[solved.unknown]} fit"


def _say_alternatives(others: Sequence[Alternative], slots: int) -> str:
    from trimkv_cli.ui.plain import columns
    from trimkv_cli.units import format_size

    rows = [("weights", "cache", "one sequence", f"rows of {slots} slots", "most slots", "full cache, tokens")]
    rows += [
        (
            each.weights,
            each.kv_dtype,
            format_size(each.bytes),
            str(each.rows),
            str(each.kv_budget),
            str(each.full_context),
        )
        for each in others
    ]
    return "\n".join(line.rstrip() for line in columns(rows))


def _as_json(plan: Plan, model: str, context: int, *, requested: str | None, more: dict[str, Any]) -> str:
    run = plan.run
    return jsonlib.dumps(
        {
            "fits": plan.fits,
            "model": model,
            "gates": {"id": run.gate.id, "trained_memory_size": run.gate.memory_size},
            "device": run.device,
            "dtype": run.dtype,
            "gguf": None if run.spec.gguf is None else asdict(run.spec.gguf),
            "quantize": run.quantize,
            "bits_per_weight": run.bits_per_weight,
            "products": _products(run) if run.packs else None,
            "kv_dtype": run.kv_dtype,
            "kv_budget": run.kv_budget,
            "pinned": None if run.gate.variant == "none" else _pinned(run),
            "rows": run.rows,
            "prefill_chunk": run.prefill_chunk,
            "parts": [asdict(part) for part in run.parts],
            "total_bytes": run.total_bytes,
            "budget_bytes": plan.budget_bytes,
            "budget": {"requested": requested, "bytes": plan.budget_bytes},
            "kv_bytes_per_sequence": run.kv_bytes_per_row,
            "full_cache": {"context": context, "bytes": run.full_cache_bytes(context)},
            "choices": list(plan.choices),
            "warnings": [asdict(warning) for warning in plan.warnings],
            "offers": list(plan.offers),
            **more,
        },
        indent=2,
    )


def _pinned(run: Run) -> dict[str, Any]:
    """Count the slots of each head that `--pin` takes by kind, and at most together, beside a system message.

    One of more tokens than `system_most` is not pinned.
    """
    pins, ends = run.pins, run.pins.ends(run.kv_budget)
    each: dict[str, Any] = {"system": bool(pins.system), "system_most": pins.system_most(run.kv_budget)}
    each |= {"sinks": pins.sinks, "recent": pins.recent, "prompt_end": ends}
    return {**each, "at_most": run.most_pinned, "at_most_in_conversation": run.most_pinned + ends}


def _as_text(plan: Plan, model: str, context: int) -> str:
    from trimkv_cli.ui.plain import columns
    from trimkv_cli.units import format_size, format_sizes

    run = plan.run
    total, budget = format_sizes(run.total_bytes, plan.budget_bytes or run.total_bytes)
    compared = {"total": total, "budget": budget}
    lines = [(name, compared.get(name) or format_size(size), note) for name, size, note in _rows(plan, context)]
    width = max(len(size) for _, size, _ in lines)
    table = columns([(label, size.rjust(width), note) for label, size, note in lines])
    return "\n".join([f"{model} with {run.gate.id}", *(line.rstrip() for line in table), "", *_remarks(plan)])


def _chunks(run: Run) -> str:
    together = min(run.rows, run.prefill_rows)
    return "one chunk" if together == 1 else f"{together} chunks"


def _rows(plan: Plan, context: int) -> Iterator[tuple[str, int, str]]:
    run = plan.run
    measured = "measured" if run.machine.calibrated(run.device) else "not measured: trimkv doctor --measure"
    notes = {
        "weights": run.dtype if run.form == "none" else f"{run.precision}{_bits(run)}, computing in {run.dtype}",
        "gates": run.gate.variant,
        "kv": f"{run.rows} × {run.kv_budget} slots per head, {run.kv_dtype}{_beside(run)}",
        "shared_prefix": "one more sequence, to share a system message",
        "rebase": "the positions of tokens that outgrow the model's",
        "journal": "what one step displaces, to undo it",
        "undo": "copies of a sequence, to undo turns",
        "requests": "what a server is asked, while it is read",
        "workspace": f"{_chunks(run)} of {run.prefill_chunk or context} prompt tokens",
        "logits": "sampling, beyond the workspace",
        "reordered": "16-bit matrices once more, as this CPU reads them for several rows",
        "dequantised": "the largest matrix, unpacked",
        "unpacked": f"the largest matrix, unpacked to {run.machine.unpacks_to} for prompts",
        "graphs": "captured steps, workspaces of products",
        "loading": "tensors in transit while the model is read",
        "slack": "what an allocator takes beyond what is asked",
        "runtime": f"{'torch and transformers' if run.device == 'cpu' else f'{run.device} context'}, {measured}",
        "quantiser": "bitsandbytes and what it imports",
        "tokenizer": "built of the vocabulary in the GGUF file",
    }
    if run.spec.gguf is not None:
        becomes = "" if run.form == "stored" else ", unpacked when loaded" if run.form == "none" else ", packed anew"
        yield "file", run.spec.gguf.bytes, f"{run.spec.gguf.types}: {run.spec.bits_per_weight} bits per weight{becomes}"
    for part in (part for part in run.parts if part.bytes):
        yield part.name.replace("_", " "), part.bytes, notes.get(part.name, "")
    yield "total", run.total_bytes, "" if plan.budget_bytes is None else "fits" if plan.fits else "does not fit"
    if plan.budget_bytes is not None:
        yield "budget", plan.budget_bytes, ""
    yield "full cache", run.full_cache_bytes(context), f"for comparison: one sequence of {context} tokens"


def _bits(run: Run) -> str:
    return f": {run.bits_per_weight} bits per weight" if run.packs else ""


def _products(run: Run) -> dict[str, Any]:
    """Return what packed products do with a prompt here, and whether that was measured or is assumed."""
    machine = run.machine
    return {
        "measured": bool(machine.products),
        "unpacks_from": machine.unpacks_from if run.unpacks else None,
        "unpacks_to": machine.unpacks_to if run.unpacks else None,
        "forms": run.packing.account,
    }


def _beside(run: Run) -> str:
    from trimkv_cli.units import format_size

    state = run.spec.state
    return "" if state is None else f"; {format_size(run.spec.state_bytes)} each of {state.layers} layers' state"


def _remarks(plan: Plan) -> Iterator[str]:
    yield from plan.choices
    said_as_choice = ("kv_budget_reduced", "prefill_chunk_reduced", "dtype_reduced", "weights_quantised")
    yield from (f"warning: {warning.message}" for warning in plan.warnings if warning.code not in said_as_choice)
    if plan.offers:
        yield "this would fit:"
        yield from (f"  {offer}" for offer in plan.offers)
