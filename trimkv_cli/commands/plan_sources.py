"""What a plan is made of: the model's shape and its gates' facts, from profiles and configs; no torch, no weights."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from trimkv_cli.engine.places import MINI, gates_place, model_place
from trimkv_cli.errors import GateMismatch, UnsupportedModel, UsageError
from trimkv_cli.mini import GATES_FOLDER
from trimkv_cli.profiles import BUILT_IN, Profile, find_profile, list_profiles, profile_for
from trimkv_cli.spec import GateSpec, ModelSpec, full_gate, read_gate_spec, read_model_spec, streaming_gate


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """A model's shape, and the profile that it came from, if any."""

    id: str
    spec: ModelSpec
    profile: Profile | None
    folder: Path | None = None  # where its files lie, when they had to be looked at

    @property
    def kv_budget(self) -> int | None:
        return self.profile.kv_budget if self.profile else None

    @property
    def prefill_chunk(self) -> int | None:
        return self.profile.prefill_chunk if self.profile else None


def find_model(name: str | None, revision: str | None, *, offline: bool) -> PlannedModel:
    """Find a model's shape: from its profile, else from its config.json, which may be downloaded."""
    profile = find_profile(name or MINI) or profile_for(name or MINI)
    place = model_place(name, revision)
    if profile is not None and profile.spec is not None and revision is None:
        return PlannedModel(id=place.id, spec=profile.spec, profile=profile)
    folder = place.folder("config", offline=offline)
    return PlannedModel(id=place.id, spec=read_model_spec(folder), profile=profile, folder=folder)


def find_gate(name: str, model: PlannedModel, *, offline: bool) -> GateSpec:
    """Find what `--gates` stands for.

    Raises:
        UnsupportedModel: auto, and the model has no gates that are known.
        GateMismatch: gates for another kind of model.
    """
    if streaming := re.fullmatch(r"streaming(?::([0-9]+))?", name):
        return streaming_gate(int(streaming[1] or 4))
    if name == "none":
        return full_gate()
    gate = _own_gate(model) if name == "auto" else _named_gate(name, offline=offline)
    if gate.model_type is not None and gate.model_type != model.spec.model_type:
        raise GateMismatch(
            f"{gate.id} holds gates for {gate.model_type}, the model is {model.spec.model_type}",
            hint="use the gates made for this model, or --gates streaming",
        )
    return gate


def _own_gate(model: PlannedModel) -> GateSpec:
    if model.profile is not None and model.profile.gate is not None:
        return _known_gate(model.profile.gate)
    if model.profile is None and model.folder is not None and (model.folder / "gates").is_dir():
        return read_gate_spec(model.folder / "gates", id=f"{model.id}/gates")
    raise UnsupportedModel(
        f"{model.id} has no retention gates",
        hint="--gates streaming, --gates none for a full cache, or trimkv gates train",
    )


def _named_gate(name: str, *, offline: bool) -> GateSpec:
    """Read gates from a profile of that name or with those gates, else from their folder's config."""
    for profile in list_profiles():
        if name in (profile.name, profile.gates) and profile.gate is not None:
            return _known_gate(profile.gate)
    place = gates_place(name)
    folder = Path(name).expanduser()
    return read_gate_spec(folder if folder.is_dir() else place.folder("config", offline=offline), id=place.id)


def _known_gate(gate: GateSpec) -> GateSpec:
    """Return what the profile says of its gates; the built-in ones lie here and speak for themselves."""
    return read_gate_spec(GATES_FOLDER, id=MINI) if gate.id == f"{BUILT_IN}{MINI}" else gate


def local_device(name: str) -> str:
    """Return the kind of device to plan for; auto is a GPU where an NVIDIA driver is loaded, else the CPU.

    Raises:
        UsageError: no device that trimkv runs on.
    """
    kind = name.partition(":")[0]
    if kind == "auto":
        return "cuda" if Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists() else "cpu"
    if kind not in ("cpu", "cuda", "mps"):
        raise UsageError(f"{name!r} is not a device that trimkv runs on", hint="auto, cpu, cuda, cuda:1 or mps")
    return kind


def machine_bytes(kind: str) -> tuple[int | None, int | None]:
    """Return this machine's memory, all and free; of a GPU neither is known without torch."""
    if kind != "cpu" or not hasattr(os, "sysconf"):
        return None, None
    import psutil

    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)
