"""Stored conversations: /save, /load, /fork, /sessions."""

from __future__ import annotations

from collections.abc import Iterable

from trimkv_cli.chat.turns import split_thought
from trimkv_cli.commands.session_table import session_table
from trimkv_cli.commands.slash.command import Chat, SlashCommand
from trimkv_cli.errors import UsageError
from trimkv_cli.ui.plain import neutralise


def _save(chat: Chat, argument: str) -> None:
    if not argument:
        if chat.autosave.name is None:
            raise UsageError("/save needs a name", hint="/save NAME")
        chat.autosave.write(chat.conversation)
    else:
        chat.autosave.save_as(argument, chat.conversation)
    chat.display.note(f"saved as {chat.autosave.name}; trimkv chat --session {chat.autosave.name} goes on with it")


def _load(chat: Chat, argument: str) -> None:
    if not argument:
        raise UsageError("/load needs a name", hint="/sessions lists them")
    why = chat.autosave.open(argument, chat.conversation)
    say_opened(chat, why)


def say_opened(chat: Chat, why_reread: str | None) -> None:
    """Show the last turn of a stored session, and say why it has to be read again if it has to."""
    conversation = chat.conversation
    if conversation.turns:
        last = conversation.turns[-1]
        chat.display.print(neutralise(f"> {last.user}\n{split_thought(last.answer)[1]}"))
    turns = f"{chat.autosave.name}: {len(conversation.turns)} turns"
    if why_reread is None:
        chat.display.note(f"{turns}, {conversation.seen:,} tokens in the cache, nothing to read again")
        return
    chat.display.note(
        f"{turns}; {why_reread}: the next message makes the model read them again, and answers may differ"
    )


def _fork(chat: Chat, argument: str) -> None:
    old = chat.autosave.name
    name = chat.autosave.fork(argument or None, chat.conversation)
    chat.display.note(f"going on in {name}; {old} stays as it is")


def _sessions(chat: Chat, _: str) -> None:
    lines = session_table(chat.autosave.store)
    for line in lines:
        chat.display.print(line)
    if not lines:
        chat.display.note("no session is stored")


def _names(chat: Chat, _: str) -> Iterable[str]:
    return chat.autosave.store.names()


SESSIONS = (
    SlashCommand(name="save", arguments="[NAME]", help="Save now, or under a name of your choice.", handler=_save),
    SlashCommand(name="load", arguments="NAME", help="Go on with a saved session.", handler=_load, complete=_names),
    SlashCommand(name="fork", arguments="[NAME]", help="Go on in a copy; this session stays as it is.", handler=_fork),
    SlashCommand(name="sessions", help="List the saved sessions.", handler=_sessions),
)
