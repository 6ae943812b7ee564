"""TOML files of settings and profiles: read, and checked against the keys that exist."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from trimkv_cli.errors import ConfigError


def read_toml(path: Path) -> dict[str, Any]:
    """Read a file.

    Raises:
        ConfigError: unreadable, or not TOML.
    """
    import tomli

    try:
        return tomli.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint="save it as UTF-8 that you may read") from None
    except tomli.TOMLDecodeError as error:
        hint = 'text needs quotes: model = "Qwen/Qwen3-4B"'
        raise ConfigError(f"{path} is not valid TOML: {error}", hint=hint) from None


_EXAMPLES: Mapping[type, str] = {
    str: '"text"', int: "512", float: "0.7", bool: "true", list: '["one", "two"]', dict: '{ key = "value" }'
}  # fmt: skip


def check_keys(values: Mapping[str, Any], known: Mapping[str, type], path: Path, *, table: str = "") -> None:
    """Check that every key exists and has a value of its type; a whole number may stand for a float.

    Raises:
        ConfigError: naming key, file and the nearest known key.
    """
    where = f" in [{table}]" if table else ""
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{where}", hint=suggest(key, known))
        wanted = (float, int) if known[key] is float else known[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and known[key] is not bool):
            expected = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
            what = expected.get(known[key], "a table" if known[key] is dict else "a list")
            raise ConfigError(
                f"{path}: {key} = {value!r}{where} is not {what}", hint=f"{key} = {_EXAMPLES[known[key]]}"
            )


def suggest(key: str, known: Iterable[str]) -> str:
    """Name the key that was probably meant, else all keys."""
    names = sorted(known)
    near = get_close_matches(key.replace("-", "_"), names, n=1)
    return f"did you mean {near[0]}?" if near else f"known keys: {', '.join(names)}"
