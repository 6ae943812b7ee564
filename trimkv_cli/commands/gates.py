"""`trimkv gates`: contents of a gate folder, and its fit to a model."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimkv_cli.commands.gates_train import train
from trimkv_cli.commands.options import JSON, CommandGroup
from trimkv_cli.errors import UsageError
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.settings import option
from trimkv_cli.ui.plain import columns, neutralise, print_warning

if TYPE_CHECKING:
    from trimkv_cli.cache.gate_files import GateFacts
    from trimkv_cli.model.spec import GateSpec

gates_app = CommandGroup(help="Look at trained retention gates.", no_args_is_help=True)

_REVISION = option(None, "Branch, tag or commit of a hub model.", "REV", panel="Model", flag="--revision")
Gates = Annotated[str, typer.Argument(metavar="GATES", help="A folder, a hub id, or a profile for its gates.")]


@gates_app.command(name="list")
def list_(*, json: bool = JSON) -> None:
    """List the gates that --gates takes by name: those that come along, those of profiles, and what needs no training.

    trimkv gates list
    """
    rows = [dict(zip(_COLUMNS, row, strict=True)) for row in _listed()]
    table = [tuple(name.upper() for name in _COLUMNS), *(tuple(_shown(v) for v in row.values()) for row in rows)]
    print(jsonlib.dumps(rows, indent=2) if json else "\n".join(columns(table)))


_COLUMNS = ("name", "model", "kind", "slots", "where")


def _shown(value: str | int | None) -> str:
    return "any" if value is None else f"{value:,}" if isinstance(value, int) else neutralise(value)


def _listed() -> Iterator[tuple[str | int | None, ...]]:
    from trimkv_cli.loading.hub import cached_repositories
    from trimkv_cli.loading.sources import shown_id
    from trimkv_cli.model.profiles import BUILT_IN, list_profiles

    here = {repository.id for repository in cached_repositories()}
    for profile in list_profiles():
        gate = profile.gate
        if gate is not None and profile.gates is not None:
            id = shown_id(profile.gates)
            place = "cached" if id.partition(":")[0] in here else id
            where = "comes along" if profile.gates.startswith(BUILT_IN) else place
            yield profile.name, shown_id(profile.model), gate.variant, gate.memory_size, where
    yield "keydiff", None, "keys that differ most from the others", None, "needs no training"
    yield "streaming", None, "the first tokens and the newest", None, "needs no training"
    yield "none", None, "nothing is evicted", None, "a full cache"


@gates_app.command()
def show(
    gates: Gates,
    *,
    gates_revision: str | None = _REVISION,
    engine: Annotated[EngineOptions, "offline"],
    json: bool = JSON,
) -> None:
    """Show what a gate folder holds: variant, budget and context it was trained for, biases, checksum.

    trimkv gates show qwen3-4b-math
    """
    from trimkv_cli.loading.sources import gates_ref

    ref = gates_ref(gates, gates_revision)
    folder = ref.folder("gates", offline=engine.offline)
    from trimkv_cli.cache.gate_files import gate_facts  # torch, only once there is something to read

    facts = gate_facts(folder, id=ref.id)
    values = {**asdict(facts.gate), **asdict(facts), "gate": facts.gate.id, "file": str(facts.file)}
    print(jsonlib.dumps(values, indent=2) if json else _as_text(facts))
    for warning in facts.warnings:
        print_warning(warning.message)


@gates_app.command()
def verify(
    gates: Gates,
    *,
    engine: Annotated[EngineOptions, "model", "offline"],
    gates_revision: str | None = _REVISION,
) -> None:
    """Check that gates fit a model: names, shapes and values of every tensor. Exit 6 when they do not.

    trimkv gates verify ./gates --model Qwen/Qwen3-4B

    Without --model: the model that the gates were trained for. --revision is the gates'.
    """
    from trimkv_cli.cache.gate_files import check_gates, read_gates
    from trimkv_cli.loading.sources import gates_ref, model_ref
    from trimkv_cli.model.folders import read_model_spec

    base = model_ref(engine.model).id if engine.model else None
    ref = gates_ref(gates, gates_revision, base=base)
    gate, tensors, _, warnings = read_gates(ref.folder("gates", offline=engine.offline), id=ref.id)
    model = model_ref(engine.model or _base_model(gate, gates))
    spec = read_model_spec(model.folder("config", offline=engine.offline))
    for warning in (*warnings, *check_gates(spec, gate, tensors, model_id=model.id)):
        print_warning(warning.message)
    layers = f"{gate.layers(spec)} layers of {spec.num_kv_heads} KV heads"
    print(neutralise(f"ok: {gate.id} ({gate.variant}) fits {model.id}: {layers}, {len(tensors)} tensors"))


def _base_model(gate: GateSpec, name: str) -> str:
    """Return the model of a profile, or what the gates name as theirs; some name a path where they were trained."""
    from trimkv_cli.model.profiles import find_profile

    profile, base = find_profile(name), gate.base_model
    if profile is not None:
        return profile.name
    if base is None or gate.by_others or (base.startswith((".", "/", "~")) and not Path(base).is_dir()):
        raise UsageError(f"{gate.id} does not say which model it is for", hint="name the model with --model")
    return base


def _as_text(facts: GateFacts) -> str:
    return "\n".join(columns([(name, neutralise(value)) for name, value in _lines(facts)]))


def _lines(facts: GateFacts) -> Iterator[tuple[str, str]]:
    from trimkv_cli.units import format_size

    gate = facts.gate
    yield "gates", gate.id
    yield "variant", _variant(facts)
    more = f" (and up to {gate.largest_memory_size:,})" if gate.largest_memory_size else ""
    context = _number(gate.trained_context)
    if gate.by_others:
        yield "scores", "static: a token's value does not fade with its age; made for no number of slots"
    else:
        yield "trained for", f"{_number(gate.memory_size)} slots per head{more}, contexts up to {context}"
    yield "base model", f"{gate.base_model or 'not said'} ({gate.model_type or 'family not said'})"
    yield "file", f"{facts.file.name}, {format_size(facts.file_bytes)}, {' and '.join(facts.dtypes)}"
    yield "sha256", facts.sha256
    for bias in facts.layers:
        yield f"layer {bias.layer}", f"bias {bias.lowest:.2f} … {bias.highest:.2f}"


def _variant(facts: GateFacts) -> str:
    gate = facts.gate
    if gate.variant == "fastkvzip":
        queries = gate.shape.queries_per_kv_head if gate.shape is not None else None
        return f"fastkvzip, {facts.input_size} → {queries} queries of {gate.hidden} per head → {facts.num_kv_heads}"
    if gate.hidden == 0:
        return f"{gate.variant}, {facts.input_size} → {facts.num_kv_heads}, linear"
    return f"{gate.variant}, {facts.input_size} → {gate.hidden} → {facts.num_kv_heads}, {facts.hidden_act}"


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


gates_app.command()(train)
