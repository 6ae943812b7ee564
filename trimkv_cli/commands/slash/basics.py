"""/help and /exit."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import fill

from trimkv_cli.commands.slash.command import Chat, SlashCommand

_KEYS = (
    "",
    'Enter sends; Alt-Enter or Ctrl-J begins a new line, and three quotes (""") open and close a message of several.',
    "Ctrl-C stops an answer and keeps what there is of it; Ctrl-D ends. Ctrl-X Ctrl-E opens $EDITOR, Tab completes.",
    "What is pasted into an empty line is a message, whatever it begins with; so is what begins with a space.",
)


def _help(chat: Chat, argument: str) -> None:
    from trimkv_cli.commands.slash.table import COMMANDS, find

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
    from trimkv_cli.commands.slash.table import COMMANDS

    return [command.name for command in COMMANDS]


BASICS = (
    SlashCommand(name="help", arguments="[COMMAND]", help="List the commands.", handler=_help, complete=_names),
    SlashCommand(name="exit", help="End; the session is saved already.", handler=_exit),
)
