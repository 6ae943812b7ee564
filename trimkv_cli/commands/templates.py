"""Prompt templates: text files in the user's configuration folder, with `$input` and other places to fill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template

from trimkv_cli.commands.documents import Reader
from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.utf8 import as_text

_SUFFIXES = (".txt", ".md")


def templates_folder() -> Path:
    """Return where templates lie; the folder may not exist."""
    from platformdirs import user_config_path

    return user_config_path("trimkv") / "templates"


def template_names() -> list[str]:
    """List the templates there are."""
    folder = templates_folder()
    return sorted({path.stem for path in folder.iterdir() if path.suffix in _SUFFIXES}) if folder.is_dir() else []


def read_template(name: str, reader: Reader) -> Template:
    """Read a template by its name, or a file by its path.

    Raises:
        InputError: there is none, or its places cannot be read.
    """
    path = find_template(name)
    template = Template(reader.text(str(path)))
    if not template.is_valid():
        raise InputError(
            f"{path} has a $ that names no place", hint="write $$ for a dollar sign, $input for the prompt"
        )
    return template


def fill(template: Template, *, name: str, user: str, parameters: Sequence[str]) -> str:
    """Put the prompt and `name=value` parameters into a template.

    Raises:
        UsageError: a place without a value, or a value without a place.
    """
    values = dict(_parameter(as_text(text, "a value of -p")) for text in parameters)
    places = set(template.get_identifiers())
    if unknown := sorted(values.keys() - places):
        raise UsageError(f"template {name} has no ${unknown[0]}", hint=f"its places: {_listed(places)}")
    if user:
        if "input" not in places:
            raise UsageError(
                f"template {name} has no $input for the prompt", hint="give no prompt, or add $input to it"
            )
        values["input"] = user
    if missing := sorted(places - values.keys()):
        hint = "give a prompt or pipe text in" if missing[0] == "input" else f"-p {missing[0]}=VALUE"
        raise UsageError(f"template {name} needs ${missing[0]}", hint=hint)
    return template.substitute(values)


def find_template(name: str) -> Path:
    """Return the file of a template.

    Raises:
        InputError: there is none of this name.
    """
    if Path(name).suffix in _SUFFIXES or "/" in name or "\\" in name:
        return Path(name)
    for suffix in _SUFFIXES:
        path = templates_folder() / f"{name}{suffix}"
        if path.is_file():
            return path
    known = template_names()
    hint = (
        f"there are {', '.join(known)}" if known else f"write it to {templates_folder() / name}.txt, with $input in it"
    )
    raise InputError(f"there is no template {name!r}", hint=hint)


def _parameter(text: str) -> tuple[str, str]:
    key, found, value = text.partition("=")
    if not found or not key:
        raise UsageError(f"-p {text} is not name=value", hint="-p language=German")
    return key, value


def _listed(names: set[str]) -> str:
    return ", ".join(f"${name}" for name in sorted(names)) or "none"
