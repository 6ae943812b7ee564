"""/help and /exit."""

from __future__ import annotations

from collections.abc import Iterable

from trimkv_cli.commands.slash.command import Chat, SlashCommand

_KEYS = """\
Enter sends; Alt-Enter or Ctrl-J begins a new line, and three quotes (\"\"\") open and close a message of several.
Ctrl-C stops an answer and keeps what there is of it; Ctrl-D ends. Ctrl-X Ctrl-E opens $EDITOR, Tab completes.
What is pasted into an empty line is a message, whatever it begins with; so is what begins with a space."""


def _help(chat: Chat, argument: str) -> None:
    from trimkv_cli.commands.slash.table import COMMANDS, find
    from trimkv_cli.ui.tables import columns

    chosen = [find(argument)] if argument else list(COMMANDS)
    rows = [(f"/{command.name} {command.arguments}".rstrip(), command.help) for command in chosen]
    for line in columns(rows):
        chat.display.print(line)
    if not argument:
        chat.display.print(f"\n{_KEYS}")


def _exit(chat: Chat, _: str) -> None:
    chat.ended = True


def _names(_: Chat, __: str) -> Iterable[str]:
    from trimkv_cli.commands.slash.table import COMMANDS

    return [command.name for command in COMMANDS]


BASICS = (
    SlashCommand(name="help", arguments="[COMMAND]", help="List the commands.", handler=_help, complete=_names),
    SlashCommand(name="exit", help="End; the session is saved already.", handler=_exit),
)
