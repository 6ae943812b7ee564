"""Profiles: one TOML file per model, with its gates, sizes and sampling defaults; the user's own come first."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from trimkv_cli.errors import ConfigError, ModelNotFound
from trimkv_cli.files import check_keys, read_toml
from trimkv_cli.mini import GATES_FOLDER
from trimkv_cli.model.gguf import block_tensors
from trimkv_cli.model.packing import Packing
from trimkv_cli.model.spec import (
    DTYPE_BYTES,
    OTHERS_VARIANTS,
    TRAINED_VARIANTS,
    GateSpec,
    GateVariant,
    GgufForm,
    ModelSpec,
)

BUILT_IN, MINI = "builtin:", "mini"
IN_WHEEL = "wheel:"
SAMPLING_KEYS: Mapping[str, type] = {
    "max_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "top_h": float,
    "repetition_penalty": float,
}
_REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+")
_VARIANTS: Mapping[str, GateVariant] = {**TRAINED_VARIANTS, **OTHERS_VARIANTS, "streaming": "streaming", "none": "none"}


@dataclass(frozen=True, slots=True, kw_only=True)
class WheelFile:
    """A file inside a Python wheel, which is only its carrier."""

    requirement: str  # NAME==VERSION
    member: str
    sha256: str
    bytes: int
    layers: str | None = None  # block types of the decoder layers' matrices, and of the vocabulary's: one of each
    vocabulary: str | None = None

    def form(self, spec: ModelSpec) -> GgufForm:
        """Say how the file stores a model, as far as this tells."""
        types = Path(self.member).name
        if self.layers is None or self.vocabulary is None:
            return GgufForm(bytes=self.bytes, types=types)
        return GgufForm(bytes=self.bytes, types=types, packing=_packing(spec, self.layers, self.vocabulary))


def _packing(spec: ModelSpec, layers: str, vocabulary: str) -> Packing:
    vocab = (spec.vocab_size, spec.hidden_size)
    kinds = [(layers, shape, spec.num_layers, False) for shape in spec.matrices]
    kinds += [(vocabulary, vocab, 1 if spec.tied else 2, True)]
    return Packing.of(block_tensors(type, shape, count=n, is_vocab=is_vocab) for type, shape, n, is_vocab in kinds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A model under a short name; a revision of None is the hub's main."""

    name: str
    path: Path
    model: str  # hub id, folder, GGUF file, "builtin:mini" or "wheel:NAME"
    revision: str | None = None
    gates: str | None = None  # hub id, folder, or "builtin:NAME", which lies in `gates/NAME` beside the profiles
    gates_revision: str | None = None
    variant: str = "rg"
    gate_hidden: int = 512
    trained_context: int | None = None
    trained_kv_budget: int | None = None
    kv_budget: int | None = None
    prefill_chunk: int | None = None
    weight_bytes: int | None = None  # in the dtype of `config`
    sampling: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)  # of config.json, what the plan needs
    wheel: WheelFile | None = None  # what carries the model

    @property
    def spec(self) -> ModelSpec | None:
        """Return the model's shape as far as the profile carries it."""
        if not self.config:
            return None
        spec = ModelSpec.from_config(self.config)
        if self.wheel is not None:
            spec = replace(spec, gguf=self.wheel.form(spec))
        if self.weight_bytes is None:
            return spec
        return replace(spec, weight_numel=self.weight_bytes // DTYPE_BYTES[spec.dtype])

    @property
    def gate(self) -> GateSpec | None:
        """Return what the profile says of its gates."""
        if self.gates is None:
            return None
        model_type = self.config.get("model_type")
        return GateSpec(
            variant=_VARIANTS[self.variant],
            id=self.gates,
            hidden=self.gate_hidden,
            memory_size=self.trained_kv_budget,
            trained_context=self.trained_context,
            base_model=self.model,
            model_type=str(model_type) if model_type else None,
        )


_TYPES: Mapping[str, type] = {"str": str, "int": int, "Mapping[str, Any]": dict, "WheelFile": dict}
_KEYS: Mapping[str, type] = {
    field.name: _TYPES[str(field.type).removesuffix(" | None")]
    for field in fields(Profile)
    if field.name not in ("name", "path")
}
_WHEEL_KEYS: Mapping[str, type] = {
    field.name: _TYPES[str(field.type).removesuffix(" | None")] for field in fields(WheelFile)
}
_WHEEL_NEEDS = ("requirement", "member", "sha256", "bytes")


def profile_folders() -> tuple[Path, ...]:
    """Return where profiles lie, the user's own folder first."""
    from platformdirs import user_config_path

    package = Path(__file__).parents[1]
    built_in = package / "_profiles"
    return user_config_path("trimkv") / "profiles", built_in if built_in.is_dir() else package.parent / "profiles"


def built_in_gates(name: str) -> Path | None:
    """Return the folder of gates that come with trimkv under this name, if there are any."""
    if name in ("", "..") or Path(name).name != name:  # a path, or the id of a repository
        return None
    folder = GATES_FOLDER if name == MINI else profile_folders()[1] / "gates" / name
    return folder if folder.is_dir() else None


def list_profiles() -> list[Profile]:
    """Read all profiles, by name; one of the user's hides a built-in one of the same name.

    Raises:
        ConfigError: a faulty file.
    """
    return [read_profile(path) for _, path in sorted(_paths().items())]


def find_profile(name: str) -> Profile | None:
    """Return the profile of this name, if there is one.

    Raises:
        ConfigError: its file is faulty.
    """
    path = _paths().get(name)
    return read_profile(path) if path else None


def load_profile(name: str) -> Profile:
    """Return the profile of this name.

    Raises:
        ModelNotFound: there is none.
        ConfigError: its file is faulty.
    """
    profile = find_profile(name)
    if profile is None:
        near = get_close_matches(name, _paths(), n=1)
        hint = f"did you mean {near[0]}?" if near else "trimkv profiles list shows them"
        raise ModelNotFound(f"there is no profile {name}", hint=hint)
    return profile


def profile_for(model_id: str) -> Profile | None:
    """Return the profile whose gates were made for a hub model; gates that rank per head go first.

    Those that others made are taken by name alone.

    Raises:
        ConfigError: a faulty file.
    """
    made_for = [
        profile
        for profile in list_profiles()
        if profile.model == model_id and profile.gates and profile.variant not in OTHERS_VARIANTS
    ]
    return min(made_for, key=lambda profile: (profile.variant != "rg", profile.name), default=None)


def profile_of_file(path: Path) -> Profile | None:
    """Return the profile whose file this is, byte for byte: a model trained on from it has the same sizes and names.

    Raises:
        ConfigError: a faulty file of a profile.
    """
    if not path.is_file():
        return None
    size = path.stat().st_size
    wheels = [profile for profile in list_profiles() if profile.wheel is not None and profile.wheel.bytes == size]
    digest = _digest(path.resolve(), path.stat().st_mtime_ns) if wheels else None
    return next((profile for profile in wheels if profile.wheel and profile.wheel.sha256 == digest), None)


@lru_cache(maxsize=4)
def _digest(path: Path, _: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def alike(spec: ModelSpec) -> Profile | None:
    """Return a profile with gates that come along for a model of these sizes, which need not be this one.

    Raises:
        ConfigError: a faulty file.
    """
    shaped = ((profile, profile.spec) for profile in list_profiles() if (profile.gates or "").startswith(BUILT_IN))
    return next((profile for profile, own in shaped if own is not None and _sizes(own) == _sizes(spec)), None)


def _sizes(spec: ModelSpec) -> tuple[str, int, int, int, int]:
    return spec.model_type, spec.num_layers, spec.hidden_size, spec.num_kv_heads, spec.vocab_size


def read_profile(path: Path) -> Profile:
    """Read one profile file.

    Raises:
        ConfigError: unreadable, unknown keys, or values of another type.
    """
    values = read_toml(path)
    check_keys(values, _KEYS, path)
    check_keys(values.get("sampling", {}), SAMPLING_KEYS, path, table="sampling")
    if not values.get("model"):
        raise ConfigError(f"{path}: key 'model' is missing", hint='model = "Qwen/Qwen3-4B"')
    if values.get("variant", "rg") not in _VARIANTS:
        raise ConfigError(f"{path}: variant {values['variant']!r} is unknown", hint=f"one of {', '.join(_VARIANTS)}")
    for key in ("kv_budget", "trained_kv_budget", "trained_context", "weight_bytes", "gate_hidden"):
        if values.get(key, 1) < 1:
            raise ConfigError(f"{path}: {key} = {values[key]} is too small", hint=f"{key} needs 1 or more")
    wheel = values.pop("wheel", None)
    return Profile(name=path.stem, path=path, **values, wheel=None if wheel is None else _read_wheel(wheel, path))


def _read_wheel(values: Mapping[str, Any], path: Path) -> WheelFile:
    check_keys(values, _WHEEL_KEYS, path, table="wheel")
    missing = [key for key in _WHEEL_NEEDS if key not in values]
    if missing or not _REQUIREMENT.fullmatch(values["requirement"]):
        what = (
            f"key {missing[0]!r} is missing" if missing else f"requirement {values['requirement']!r} names no version"
        )
        raise ConfigError(f"{path}: {what} in [wheel]", hint='requirement = "name==1.0"')
    return WheelFile(**values)


def _paths() -> dict[str, Path]:
    return {path.stem: path for folder in reversed(profile_folders()) for path in folder.glob("*.toml")}
