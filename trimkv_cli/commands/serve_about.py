"""What a server says of itself: to commands that look for one, and in each answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimkv_cli.chat.conversation import starts_in_thought
from trimkv_cli.chat.turns import THINKS
from trimkv_cli.loading.options import EngineOptions, SamplingOptions
from trimkv_cli.loading.sources import find_here
from trimkv_cli.model.profiles import MINI, find_profile
from trimkv_cli.plan.plan import make_plan
from trimkv_cli.serve.about import About, said_by, stamp

if TYPE_CHECKING:
    from trimkv_cli.commands.serve import ServeOptions
    from trimkv_cli.engine.facts import EngineFacts
    from trimkv_cli.plan.run import Run
    from trimkv_cli.serve.completions import Completions
    from trimkv_cli.serve.worker import Worker


def about_server(
    facts: EngineFacts,
    completions: Completions,
    form: ServeOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> About:
    """Say what runs, for commands that look for a server which means the same as they do."""
    run, said = facts.plan.run, said_by(engine)
    chosen = ("kv_budget", "prefill_chunk", "dtype", "kv_dtype", "quantize")
    free = run if engine.budget is None else _without_budget(facts, engine)
    profile = find_profile(engine.profile or engine.model or MINI)
    files = [name for name in (said["model"], said["gates"]) if Path(name).is_absolute()]
    files += [] if profile is None else [str(profile.path)]
    defaults = completions.rules.defaults
    fixed = {"top_h": defaults.top_h, "think_budget": defaults.think_budget, "think": form.think}
    fixed["max_tokens"] = sampling.max_tokens
    return About(
        model=facts.model_id,
        said=said,
        resolved={name: getattr(run, name) for name in (*chosen, "device")},
        budget_bytes=facts.plan.budget_bytes,
        reduced=[name for name in chosen if free is None or getattr(run, name) != getattr(free, name)],
        gates={"id": facts.gate.id, "trained_memory_size": facts.gate.memory_size},
        defaults=dict(facts.sampling_defaults),
        fixed={name: value for name, value in fixed.items() if value is not None},
        stamps={name: stamp(name) for name in files},
        notes=list(facts.notes),
        warnings=[asdict(each) for each in facts.warnings],
        thinks=getattr(completions.text, "think_tags", None) is not None,
        in_thought=_in_thought(completions.text),
    )


def _in_thought(text: Any) -> dict[str, bool]:
    if text is None or not text.template:
        return {}
    return {said: starts_in_thought(text, think=think) for think, said in THINKS.items()}


def _without_budget(facts: EngineFacts, engine: EngineOptions) -> Run | None:
    """Return what would run if there were no budget; None where that cannot be told from the files that are here."""
    run, unbounded = facts.plan.run, replace(engine, budget=None)
    source = find_here(unbounded)
    if source is None:
        return None
    options = source.plan_options(unbounded, device=run.device, memory_bytes=(None, None))
    return make_plan(run.spec, run.gate, options).run


def memory_now(worker: Worker, facts: EngineFacts, requested: str | None) -> Callable[[], dict[str, Any]]:
    """Return what says, in each answer, what the memory of the process was then."""
    plan, gauge = facts.plan, worker.gauge
    fixed = {
        "weights_bytes": facts.weight_bytes,
        "weights": plan.run.precision,
        "bits_per_weight": plan.run.bits_per_weight,
        "gate_bytes": facts.gate_bytes,
        "workspace_bytes": plan.run.workspace_bytes,
        "planned_bytes": plan.run.total_bytes,
    }
    budget = {"requested": requested, "bytes": plan.budget_bytes, "kv_budget": plan.run.kv_budget}

    def now() -> dict[str, Any]:
        held = None if plan.budget_bytes is None else gauge.peak_bytes <= plan.budget_bytes
        memory = {**fixed, "kv_bytes": gauge.kv_bytes, "peak_bytes": gauge.peak_bytes}
        return {"budget": {**budget, "honoured": held}, "memory": memory}

    return now
