"""Write the README's table of commands from their own help, so that neither can be forgotten.

python -m bench.command_table
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trimkv_cli.app import command_tree

_README = Path(__file__).parents[2] / "README.md"
_BLOCK = re.compile(r"(<!-- commands: [^\n]* -->\n).*?(<!-- /commands -->)", re.DOTALL)


def commands() -> Iterator[tuple[str, str]]:
    """Yield each command as it is typed, with its help; of groups, each command in them."""
    for name, command in command_tree().commands.items():
        children = getattr(command, "commands", None)
        yield from _named(f"trimkv {name}", children) if children is not None else _named("trimkv", {name: command})


def summary(help_text: str) -> str:
    """Return what a command does: the first paragraph of its help on one line."""
    return " ".join(help_text.strip().partition("\n\n")[0].split())


def examples(help_text: str) -> list[str]:
    """Return the command lines that a help text shows."""
    lines = (line.strip() for line in help_text.splitlines())
    return [line for line in lines if re.match(r"([\w ]+\| )?trimkv ", line)]


def table() -> str:
    """Return the table in Markdown."""
    rows = (f"| `{name}` | {summary(command.help or '')} |" for name, command in _lines())
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def fill(readme: str) -> str:
    """Put the table between its marks."""
    return _BLOCK.sub(lambda found: f"{found[1]}{table()}\n{found[2]}", readme)


def _lines() -> Iterator[tuple[str, Any]]:
    """Yield what gets a line in the table: a command, or a group with what there is in it."""
    for name, command in command_tree().commands.items():
        children = getattr(command, "commands", None)
        yield name if children is None else f"{name} {' / '.join(children)}", command


def _named(path: str, children: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    return ((f"{path} {name}", child.help or "") for name, child in children.items() if not child.hidden)


if __name__ == "__main__":
    _README.write_text(fill(_README.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
