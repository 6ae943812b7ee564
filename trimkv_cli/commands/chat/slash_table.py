"""The table of slash commands: how one is found, run and completed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from textwrap import fill

from trimkv_cli.commands.chat.slash_command import Chat, SlashCommand
from trimkv_cli.commands.chat.slash_memory import MEMORY
from trimkv_cli.commands.chat.slash_sessions import FILES, SESSIONS
from trimkv_cli.commands.chat.slash_settings import SETTINGS, TURNS
from trimkv_cli.errors import UsageError
from trimkv_cli.files import as_path, as_text
from trimkv_cli.ui.plain import neutralise

_KEYS = (
    "",
    'Enter sends; Alt-Enter or Ctrl-J begins a new line, and three quotes (""") open and close a message of several.',
    "Ctrl-C stops an answer and keeps what there is of it; Ctrl-D ends. Ctrl-X Ctrl-E opens $EDITOR, Tab completes.",
    "What is pasted into an empty line is a message, whatever it begins with; so is what begins with a space.",
)


def _help(chat: Chat, argument: str) -> None:

    chosen = [find(argument)] if argument else list(COMMANDS)
    rows = [(f"/{command.name} {command.arguments}".rstrip(), command.help) for command in chosen]
    indent, width = max(len(name) for name, _ in rows) + 2, chat.display.look.width
    for name, text in rows:
        chat.display.print(fill(text, width, initial_indent=name.ljust(indent), subsequent_indent=" " * indent))
    for line in _KEYS if not argument else ():
        chat.display.print(fill(line, width))


def _exit(chat: Chat, _: str) -> None:
    chat.ended = True


def _names(_: Chat, __: str) -> Iterable[str]:

    return [command.name for command in COMMANDS]


BASICS = (
    SlashCommand(name="help", arguments="[COMMAND]", help="List the commands.", handler=_help, complete=_names),
    SlashCommand(name="exit", help="End; the session is saved already.", handler=_exit),
)

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
