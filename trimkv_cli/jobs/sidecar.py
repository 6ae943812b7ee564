"""The file beside an output that says what made it, and of which input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.files import whole_file
from trimkv_cli.jobs.lines import Rules

FORMAT = 1
_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "top_h",
    "repetition_penalty",
    "stop",
    "ignore_eos",
)
_LIBRARIES = ("torch", "transformers", "tokenizers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """What changes the tokens of a job, by name, and how much of the input has been read (unpacked bytes)."""

    fingerprint: Mapping[str, str]
    input_bytes: int = 0
    input_sha256: str = ""


def path_beside(output: Path) -> Path:
    """Return where an output's sidecar lies."""
    return output.with_name(f"{output.name}.trimkv.json")


def job_fingerprint(
    engine: Mapping[str, str], rules: Rules, *, template: str, choices: Mapping[str, object], prompt_column: str | None
) -> dict[str, str]:
    """Name everything that decides a job's tokens: `engine` is the engine's own fingerprint, `choices` the user's."""
    sampling = {name: str(getattr(rules.defaults, name)) for name in _SAMPLING}
    versions = {name: version(name) for name in _LIBRARIES}
    return {
        **engine,
        **versions,
        "template": template,
        **{name: str(value) for name, value in choices.items()},
        "think": str(rules.think),
        "input_format": f"column {prompt_column}" if prompt_column else "text" if rules.text else "jsonl",
        "seed": str(rules.defaults.seed),
        **({"special_tokens": "True"} if rules.special_tokens else {}),
        **sampling,
    }


def check_fingerprint(output: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise when a job would go on with other tokens than it began with.

    Raises:
        UsageError: naming each field that differs.
    """
    names = [*before, *(name for name in now if name not in before)]
    changed = [
        f"{name} ({before.get(name)} before, {now.get(name)} now)" for name in names if _differs(name, before, now)
    ]
    if changed:
        raise UsageError(
            f"{output} was made with other settings: {', '.join(changed)}",
            hint="give the same settings, another -o, or --overwrite to start anew",
        )


def _differs(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    return before.get(name) != now.get(name)


def read_sidecar(path: Path) -> Sidecar | None:
    """Read a sidecar; None where there is none.

    Raises:
        InputError: it is damaged, or of another format.
    """
    try:
        data: Any = orjson.loads(path.read_bytes())
        known = {field.name for field in fields(Sidecar)}
        if data["format"] != FORMAT:
            raise InputError(f"{path} has format {data['format']}, and this trimkv reads {FORMAT}")
        return Sidecar(**{name: value for name, value in data.items() if name in known})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"cannot read {path}: {error}", hint="--overwrite starts anew") from error


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Replace a sidecar as a whole.

    Raises:
        UsageError: the folder cannot be written to.
        TrimkvError: the disk is full.
    """
    with whole_file(path, hint="give another file to -o") as partial:
        partial.write_bytes(orjson.dumps({"format": FORMAT, **asdict(sidecar)}, option=orjson.OPT_INDENT_2) + b"\n")
