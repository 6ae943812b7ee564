"""Options as plain data, and their values below the command line: environment, project, the user's file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trimkv_cli.errors import ConfigError
from trimkv_cli.files import as_text, check_keys, read_toml, whole_file, writing

Clash = Callable[[Any, Any], bool]  # of the value said and the one below
LOADS_CODE = ("trust_remote_code",)
_PREFIX = "TRIMKV_"
_OTHER_VARIABLES = ("TRIMKV_DEBUG",)
_TEXTS = ("system", "stop")  # what a model reads; the rest names files and things
_SIZES = ("budget", "kv_budget")  # text that may be a bare number in TOML
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def option(
    default: Any,
    help: str,
    metavar: str | None = None,
    *,
    panel: str | None = None,
    short: str | None = None,
    flag: str | None = None,
    least: int | None = None,
    setting: bool = False,
    check: Callable[[Any], object] | None = None,
) -> Any:
    """Return a dataclass field that is an option of the command line as well, called as the field is.

    `default` may be `...`: it has to be said. With `flag` it has another name, or several; with `setting` files and
    environment may say it under the field's name.
    """
    about: dict[str, Any] = {"help": help, "metavar": metavar, "panel": panel, "short": short, "flag": flag}
    about |= {"least": least, "setting": setting, "check": check}
    return field(metadata=about) if default is ... else field(default=default, metadata=about)


def load_settings(
    cwd: Path, environ: Mapping[str, str], known: Mapping[str, type], check: Callable[[str, Any, str], object]
) -> Mapping[str, Any]:
    """Return the settings of the user's file, the project's and the environment: what comes later wins.

    `known` says of which type each is, `check` gets name, value and place of every one.

    Raises:
        ConfigError: an unknown key, a value of another type, a project file that would have code loaded.
    """
    merged: Mapping[str, Any] = {}
    for place, values in _layers(cwd, environ, known):
        for key, value in values.items():
            check(key, value, f"{place}: {key}" if place else f"{_PREFIX}{key.upper()}={value}")
        merged = overlay(merged, values)
    return merged


def _layers(
    cwd: Path, environ: Mapping[str, str], known: Mapping[str, type]
) -> Iterator[tuple[Path | None, dict[str, Any]]]:
    """Yield files and the environment with their settings, the lowest first."""
    from platformdirs import user_config_path

    own = user_config_path("trimkv") / "config.toml"
    if own.is_file():
        yield own, _checked(read_toml(own), own, known)
    for path, values in _project_settings(cwd):
        settings = _checked(values, path, known)
        for key in settings.keys() & set(LOADS_CODE):
            hint = f"a project may not have code loaded; put {key} into your own config.toml"
            raise ConfigError(f"{path}: {key} is not allowed in a project file", hint=hint)
        yield path, settings
    yield None, _environment_settings(environ, known)


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings `below` with those `above` laid over them; what goes with another choice is gone."""
    new = {said: value for said, value in above.items() if value is not None and below.get(said) != value}
    rivals = ((value, *rule) for said, value in new.items() for rule in _RIVALS.get(said, {}).items())
    gone = {key for value, key, clash in rivals if key in below and clash(value, below[key])}
    return {**{key: value for key, value in below.items() if key not in gone}, **above}


def _always(_value: Any, _other: Any) -> bool:
    return True


def _if_on(value: Any, _other: Any) -> bool:
    return bool(value)


def _names_one_models_gates(_value: Any, gates: Any) -> bool:
    return str(gates).partition(":")[0] not in ("auto", "none", "streaming", "keydiff")


def _no_gpu(device: Any) -> bool:
    return str(device).partition(":")[0] not in ("auto", "cuda")


_FILTERS = ("top_p", "top_k", "min_p", "top_h")
_CPU, _EXACT = ("auto", "cpu"), ("auto", "fp32", "float32")
_CPU_FORMS = ("int4", "stored")
_OF_A_MODEL: Mapping[str, Clash] = {"revision": _always, "gates": _names_one_models_gates}
# What is said in one place takes these with it that were said in a place below, where the two values clash.
_RIVALS: Mapping[str, Mapping[str, Clash]] = {
    "model": {"profile": _always, **_OF_A_MODEL},
    "profile": {"model": _always, **_OF_A_MODEL},
    "shape": {"model": _always, "profile": _always, **_OF_A_MODEL},
    "greedy": {
        "temperature": lambda greedy, value: bool(greedy or value == 0),
        **dict.fromkeys(_FILTERS, _if_on),
    },
    "temperature": {"greedy": _always},
    **{name: {"greedy": _always, "temperature": lambda _, value: bool(value == 0)} for name in _FILTERS},
    "system_file": {"system": _always},
    "raw": {"system": _if_on},
    "cache": {"system": _always, "server": _always},
    "deterministic": {
        "device": lambda on, device: on and device not in _CPU,
        "dtype": lambda on, dtype: on and dtype not in _EXACT,
    },
    "device": {
        "deterministic": lambda device, _: device not in _CPU,
        "kv_dtype": lambda device, kv_dtype: kv_dtype == "fp8" and _no_gpu(device),
        "quantize": lambda device, quantize: quantize in _CPU_FORMS and device not in _CPU,
    },
    "dtype": {"deterministic": lambda dtype, _: dtype not in _EXACT},
    "kv_dtype": {"device": lambda kv_dtype, device: kv_dtype == "fp8" and _no_gpu(device)},
    "quantize": {"device": lambda quantize, device: quantize in _CPU_FORMS and device not in _CPU},
    "save_cache": {"on_overflow": lambda path, how: isinstance(path, str) and how == "map-reduce"},  # one reading
    "budgets": {"kv_budget": _always},
}


def _project_settings(cwd: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Read the nearest project file from `cwd` up to the folder with .git; without one, only `cwd` counts."""
    return next(filter(None, map(_files_of, _project_folders(cwd))), [])


def _project_folders(cwd: Path) -> list[Path]:
    folders = [cwd, *cwd.parents]
    root = next((i for i, folder in enumerate(folders) if (folder / ".git").exists()), 0)
    return folders[: root + 1]


def _files_of(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the settings that a folder holds; trimkv.toml goes before pyproject.toml."""
    own, shared = folder / "trimkv.toml", folder / "pyproject.toml"
    if own.is_file():
        return [(own, read_toml(own))]
    tool = read_toml(shared).get("tool", {}) if shared.is_file() else {}
    return [(shared, tool["trimkv"])] if isinstance(tool.get("trimkv"), dict) else []


def _environment_settings(environ: Mapping[str, str], known: Mapping[str, type]) -> dict[str, Any]:
    """Read TRIMKV_KV_BUDGET and its like; other names with our prefix are left alone unless they look misspelt."""
    settings = {}
    for variable, text in environ.items():
        key = variable.removeprefix(_PREFIX).lower()
        if not variable.startswith(_PREFIX) or not text or variable in _OTHER_VARIABLES:
            continue
        if key in known:
            settings[key] = _parse(variable, text, known[key])
        elif near := get_close_matches(key, known, n=1, cutoff=0.8):
            raise ConfigError(f"unknown variable {variable}", hint=f"did you mean {_PREFIX}{near[0].upper()}?")
    return settings


def _parse(variable: str, text: str, kind: type) -> Any:
    if variable.removeprefix(_PREFIX).lower() in _TEXTS:
        text = as_text(text, variable)
    try:
        if kind is bool:
            return _BOOLEANS[text.strip().lower()]
        return [text] if kind is list else kind(text)
    except (ValueError, KeyError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{variable}={text} is not {expected}", hint=f"set it to that, or unset {variable}") from None


def _checked(values: Mapping[str, Any], path: Path, known: Mapping[str, type]) -> dict[str, Any]:
    settings = {key.replace("-", "_"): value for key, value in values.items()}
    for key in _SIZES:
        if type(settings.get(key)) is int:
            settings[key] = str(settings[key])
    check_keys(settings, known, path)
    return settings


def set_user_setting(key: str, value: str) -> Path:
    """Write one line of the user's config.toml, in the place of an earlier one; return the file.

    Raises:
        ConfigError: the file is no TOML.
        TrimkvError: it cannot be written.
    """
    from platformdirs import user_config_path

    path = user_config_path("trimkv") / "config.toml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text:
        read_toml(path)
    line = f"{key} = {json.dumps(value)}"
    head, table, rest = text.partition("\n[") if not text.startswith("[") else ("", "", text)
    found = re.compile(rf"^{key}\s*=.*$", re.MULTILINE)
    head = found.sub(lambda _: line, head) if found.search(head) else f"{line}\n{head}"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(head + table + rest, encoding="utf-8")
    return path
