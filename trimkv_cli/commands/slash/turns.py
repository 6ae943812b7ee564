"""Going back and on: /clear, /regen, /undo, /edit, /continue."""

from __future__ import annotations

from trimkv_cli.commands.slash.command import Chat, SlashCommand, whole_number
from trimkv_cli.errors import TrimkvError, UsageError


def say_if_reread(chat: Chat) -> None:
    """Say that the next message makes the model read again, if it does."""
    if chat.conversation.must_reread:
        why = chat.conversation.why_lost or "no state of the cache is left from then"
        chat.display.note(f"{why}: the next message makes the model read the turns again, and answers may differ")


def _clear(chat: Chat, _: str) -> None:
    chat.conversation.clear()
    kept, chat.attached = chat.autosave.name, []
    chat.autosave.start_anew()
    chat.display.note(f"a new conversation; /load {kept} goes back" if kept else "a new conversation")


def _undo(chat: Chat, argument: str) -> None:
    gone = chat.conversation.undo(whole_number(argument, 1))
    chat.autosave.write(chat.conversation)
    turns = f"{len(gone)} turns" if len(gone) > 1 else "1 turn"
    chat.display.note(f"took back {turns}; {len(chat.conversation.turns)} left")
    say_if_reread(chat)


def _regen(chat: Chat, _: str) -> None:
    if not chat.conversation.turns:
        raise UsageError("there is no answer to make again", hint="send a message first")
    (last,) = chat.conversation.undo()
    if chat.conversation.params.greedy:
        chat.display.note("greedy: the answer will be the same; /set temperature 0.7 lets it vary")
    say_if_reread(chat)
    try:
        chat.run(lambda stopped: chat.conversation.say(last.user, stopped, attempt=last.attempt + 1))
    except TrimkvError:
        chat.conversation.redo([last])
        raise


def _edit(chat: Chat, _: str) -> None:
    if not chat.conversation.turns:
        raise UsageError("there is no message to edit", hint="send one first")
    (last,) = chat.conversation.undo()
    chat.autosave.write(chat.conversation)
    chat.draft = last.user
    chat.display.note("the last turn is taken back; edit its message and send it")
    say_if_reread(chat)


def _continue(chat: Chat, _: str) -> None:
    chat.run(chat.conversation.go_on)


TURNS = (
    SlashCommand(name="clear", help="Begin a new conversation; the old one stays saved.", handler=_clear),
    SlashCommand(name="regen", help="Take back the last answer and make another one.", handler=_regen),
    SlashCommand(name="undo", arguments="[N]", help="Take back the last turn, or the last N.", handler=_undo),
    SlashCommand(name="edit", help="Take back the last turn and edit its message.", handler=_edit),
    SlashCommand(name="continue", help="Go on with an answer that was cut.", handler=_continue),
)
