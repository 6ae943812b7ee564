"""Mistakes in the documentation that a machine can find."""

from __future__ import annotations

import re
from pathlib import Path

from trimkv_cli.app import app
from trimkv_cli.bench import readme

ROOT = Path(__file__).parents[2]


def test_the_table_is_the_recorded_one() -> None:
    """Catches a number that was typed, or a result recorded anew and not shown."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.fill(text) == text
    assert readme.table() in text


def test_every_command_in_the_readme_exists() -> None:
    """Catches documentation of commands that are gone."""
    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    known |= {str(group.name) for group in app.registered_groups}
    named = set(re.findall(r"^trimkv (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert named
    assert named <= known
