"""What a user's options come to: a model folder with its spec, gates with theirs. Plain Python; no weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimkv_cli.engine.options import EngineOptions
from trimkv_cli.engine.places import MINI, gates_place, model_place, shown_id
from trimkv_cli.errors import InputError, UnsupportedModel, UsageError
from trimkv_cli.plan import Warning
from trimkv_cli.profiles import Profile, find_profile, list_profiles, load_profile
from trimkv_cli.spec import GateSpec, ModelSpec, full_gate, read_model_spec, streaming_gate

_STREAMING = re.compile(r"streaming(?::(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model and its gates, found; `sampling` and `kv_budget` are the profile's defaults."""

    model_id: str
    folder: Path
    spec: ModelSpec
    gate: GateSpec
    gates_folder: Path | None  # None for constant gates
    sampling: Mapping[str, Any] = field(default_factory=dict)
    kv_budget: int | None = None
    prefill_chunk: int | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[Warning, ...] = ()


def find_source(options: EngineOptions) -> Source:
    """Find the model and the gates that the options name, downloading what is not there unless that is forbidden.

    Raises:
        ModelError: nothing of that name, no gates for it, or a network that is needed and not there.
        UsageError: options that contradict each other.
    """
    name, profile = _named(options)
    place = model_place(name, options.revision)
    folder = place.folder("model", offline=options.offline)
    spec = read_model_spec(folder)
    gate, gates_folder = _find_gates(options, profile, folder, place.id)
    return Source(
        model_id=place.id,
        folder=folder,
        spec=spec,
        gate=gate,
        gates_folder=gates_folder,
        sampling=profile.sampling if profile is not None else {},
        kv_budget=profile.kv_budget if profile is not None and gates_folder is not None else None,
        prefill_chunk=profile.prefill_chunk if profile is not None else None,
        notes=_notes(name, place.id),
    )


def _named(options: EngineOptions) -> tuple[str | None, Profile | None]:
    """Return the model's name, and the profile that it is or that was named beside it."""
    if options.profile is None:
        return options.model, find_profile(options.model or MINI)
    profile = load_profile(options.profile)
    if options.model not in (None, profile.name, profile.model):
        raise UsageError(
            f"--profile {profile.name} is for {shown_id(profile.model)}, and --model says {options.model}",
            hint="leave one of them out",
        )
    return profile.name, profile


def _find_gates(
    options: EngineOptions, profile: Profile | None, folder: Path, model_id: str
) -> tuple[GateSpec, Path | None]:
    if options.gates == "none":
        return full_gate(), None
    if _STREAMING.fullmatch(options.gates):
        return streaming_gate(_sinks(options.gates)), None
    if options.gates == "auto":
        return _own_gates(options, profile, folder, model_id)
    place = gates_place(options.gates)
    return _described(place.folder("gates", offline=options.offline), place.id)


def _own_gates(
    options: EngineOptions, profile: Profile | None, folder: Path, model_id: str
) -> tuple[GateSpec, Path | None]:
    """Take the profile's gates, those in the model's own folder, or those of a profile made for this model."""
    if profile is None and (folder / "gates").is_dir():
        return _described(folder / "gates", f"{model_id}/gates")
    known = profile or next((p for p in list_profiles() if p.model == model_id and p.gates), None)
    if known is None or known.gates is None:
        raise UnsupportedModel(
            f"{model_id} has no retention gates",
            hint="--gates streaming, --gates none for a full cache, or trimkv gates train",
        )
    place = gates_place(known.name)
    return _described(place.folder("gates", offline=options.offline), place.id)


def _described(folder: Path, id: str) -> tuple[GateSpec, Path]:
    """Read what a gate folder says of itself; its tensors are looked at when they are loaded."""
    path = next((p for p in (folder / "gates.json", folder / "config.json") if p.is_file()), folder / "gates.json")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", hint="get the gate folder again") from error
    config.setdefault("retention_gate", "rg")  # older files do not say it; the tensors do
    return GateSpec.from_config({"max_seq_len": config.get("trained_context"), **config}, id=id), folder


def _sinks(gates: str) -> int:
    match = _STREAMING.fullmatch(gates)
    return int(match[1]) if match is not None and match[1] else 4


def _notes(name: str | None, model_id: str) -> tuple[str, ...]:
    if model_id != MINI:
        return ()
    stand_in = "the built-in mini is a stand-in with random weights: what it writes has no meaning"
    return (stand_in,) if name is not None else (f"no model given: using the built-in mini. {stand_in}",)
