"""All slash commands, how one is found, and how a line is completed."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from trimkv_cli.commands.slash.basics import BASICS
from trimkv_cli.commands.slash.command import Chat, SlashCommand
from trimkv_cli.commands.slash.files import FILES
from trimkv_cli.commands.slash.memory import MEMORY
from trimkv_cli.commands.slash.sessions import SESSIONS
from trimkv_cli.commands.slash.settings import SETTINGS
from trimkv_cli.commands.slash.turns import TURNS
from trimkv_cli.errors import UsageError
from trimkv_cli.ui.plain import neutralise
from trimkv_cli.utf8 import as_path, as_text

COMMANDS: tuple[SlashCommand, ...] = (*BASICS, *TURNS, *SETTINGS, *FILES, *SESSIONS, *MEMORY)


def find(name: str) -> SlashCommand:
    """Return the command called `name`, with or without its slash.

    Raises:
        UsageError: there is none; the nearest is suggested.
    """
    wanted = name.removeprefix("/")
    known = {command.name: command for command in COMMANDS}
    if wanted in known:
        return known[wanted]
    near = get_close_matches(wanted.lower(), known, n=1, cutoff=0.5) or [n for n in known if n.startswith(wanted[:1])]
    hint = f"/{near[0]}: {known[near[0]].help}" if near and wanted else "/help lists the commands"
    raise UsageError(
        f"there is no command /{neutralise(wanted)}; nothing was sent",
        hint=f"did you mean {hint}" if near and wanted else hint,
    )


def is_command(text: str) -> bool:
    """Say whether a typed text is a command: one line that begins with a slash."""
    return text.startswith("/") and "\n" not in text.strip("\n")


def run_command(chat: Chat, line: str) -> None:
    """Run a typed command; raises what it raises, UsageError where there is none, NotUtf8 for bytes in its argument."""
    name, _, argument = line.strip().partition(" ")
    command, argument = find(name), argument.strip()
    command.handler(chat, as_path(argument) if command.takes_path else as_text(argument, f"what follows {name}"))


def complete(chat: Chat, text: str) -> Iterator[tuple[str, int, str]]:
    """Yield (completion, characters that it replaces, help) for the text before the cursor."""
    if not is_command(text):
        return
    name, gap, argument = text[1:].partition(" ")
    if not gap:
        found = (command for command in COMMANDS if command.name.startswith(name))
        yield from ((f"{command.name} ", len(name), command.help) for command in found)
        return
    command = next((command for command in COMMANDS if command.name == name), None)
    for candidate in command.complete(chat, argument) if command is not None else ():
        if candidate.startswith(argument):
            yield candidate, len(argument), ""
