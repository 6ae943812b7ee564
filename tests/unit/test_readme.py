"""Mistakes in the documentation that a machine can find."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from bench import command_table as reference
from bench import readme
from trimkv_cli import errors
from trimkv_cli.app import app
from trimkv_cli.commands.table import ENTRIES

ROOT = Path(__file__).parents[2]


def test_the_table_is_the_recorded_one() -> None:
    """Catches a number that was typed, or a result recorded anew and not shown."""
    for path, text in readme.pages().items():
        assert path.read_text(encoding="utf-8") == text, "python -m bench.readme writes it anew"
        assert "| " in text.partition("<!-- measured")[2], path


def test_every_command_in_the_readme_exists() -> None:
    """Catches documentation of commands that are gone."""
    known = {entry.name for entry in ENTRIES}
    named = set(re.findall(r"^trimkv (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert named
    assert named <= known


def test_the_commands_are_those_that_there_are() -> None:
    """Catches a command that the README does not know, and help that has changed since."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert reference.table() in text, "python -m bench.command_table writes it anew"
    assert reference.fill(text) == text


def test_the_help_names_every_exit_code() -> None:
    """Catches a new kind of error that scripts are not told of."""
    kinds = (kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.TrimkvError))
    said = str(app.info.epilog).split("Settings")[0]
    assert {str(kind.exit_code) for kind in kinds} <= set(re.findall(r"\d+", said))


def test_every_command_shows_how_it_is_used() -> None:
    """Catches help without an example, and an example of another command."""
    for name, text in reference.commands():
        shown = reference.examples(text)
        assert shown, f"the help of {name} shows no line that begins with it"
        assert all(name in line for line in shown), name
        assert reference.summary(text).endswith("."), name
