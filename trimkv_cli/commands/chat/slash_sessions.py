"""Slash commands about sessions and files: /save, /load, /fork, /sessions, /file, /export, /copy."""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from trimkv_cli.chat.conversation import need_chat
from trimkv_cli.chat.store import Transcript
from trimkv_cli.chat.turns import split_thought
from trimkv_cli.commands.chat.slash_command import Chat, SlashCommand
from trimkv_cli.commands.sessions import session_table
from trimkv_cli.errors import UsageError
from trimkv_cli.files import whole_file
from trimkv_cli.request import Request
from trimkv_cli.ui.fences import code_blocks
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
    if chat.here is None and chat.autosave.store.read(argument).states:
        raise UsageError(f"{argument}, which was stored with its cache, needs --server off")
    why = chat.autosave.open(argument, chat.conversation)
    say_opened(chat, why)


def say_opened(chat: Chat, why_reread: str | None) -> None:
    """Show the last turn of a stored session, and say why it has to be read again if it has to."""
    conversation = chat.conversation
    if conversation.turns:
        last = conversation.turns[-1]
        chat.display.print(neutralise(f"> {last.user}\n{split_thought(last.answer)[1]}"))
    turns = f"{chat.autosave.name}: {len(conversation.turns)} turns"
    if chat.here is None:
        chat.display.note(f"{turns}; what of them the server does not hold it reads again, and answers may differ")
        return
    if why_reread is None:
        chat.display.note(f"{turns}, {conversation.held.seen:,} tokens in the cache, nothing to read again")
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


def _file(chat: Chat, argument: str) -> None:
    from trimkv_cli.commands.documents import Reader

    if not argument:
        names = ", ".join(name for name, _ in chat.attached)
        chat.display.note(f"attached: {names}" if names else "nothing is attached; /file PATH attaches a file")
        return
    if argument == "none":
        chat.attached.clear()
        chat.display.note("nothing is attached any more")
        return
    text = Reader(encoding=chat.encoding).document(str(Path(argument).expanduser())).text
    _check_room(chat, argument, text)
    chat.attached.append((argument, text.strip("\n")))
    chat.display.note(f"{argument}: {len(text):,} characters go with your next message")


def _check_room(chat: Chat, name: str, text: str) -> None:
    """Refuse a file that no message could be sent with; a server counts its tokens when it is sent."""
    conversation = chat.here
    if conversation is None:
        return
    ids = need_chat(conversation.llm.text).encode("\n\n".join([*(content for _, content in chat.attached), text]))
    left = conversation.llm.room(
        Request(id="file", prompt_token_ids=tuple(ids), params=conversation.params, continues=conversation.row)
    )
    if left < 1:
        others = "" if not chat.attached else ", with what is attached already,"
        raise UsageError(
            f"{name} is not attached: {len(ids):,} tokens{others} do not fit {len(ids) + left - 1:,} positions left",
            hint="trimkv summarize reads it in parts; trimkv chat --on-overflow rebase goes on past the last position",
        )


def _export(chat: Chat, argument: str) -> None:
    from trimkv_cli.chat.export import export, form_of

    if not argument:
        raise UsageError("/export needs a file", hint="/export talk.md, or .json, .jsonl, .html")
    form, path = form_of(argument), Path(argument).expanduser()
    if path.exists():
        raise UsageError(f"{path} exists", hint="take another name")
    with whole_file(path) as partial:
        partial.write_text(export(_transcript(chat), form), encoding="utf-8")
    chat.display.note(f"wrote {path}")


def _transcript(chat: Chat) -> Transcript:
    conversation = chat.conversation
    now = time.time()
    return Transcript(
        name=chat.autosave.name or "conversation",
        model=conversation.model_id,
        fingerprint=conversation.fingerprint,
        system=conversation.system,
        think=conversation.think,
        sampling=asdict(conversation.params),
        turns=tuple(conversation.turns),
        created=now,
        updated=now,
    )


def _copy(chat: Chat, argument: str) -> None:
    if not chat.conversation.turns:
        raise UsageError("there is no answer to copy", hint="send a message first")
    answer = split_thought(chat.conversation.turns[-1].answer)[1]
    text = _last_code(answer) if argument == "code" else answer
    if argument not in ("", "code"):
        raise UsageError(f"cannot copy {argument!r}", hint="/copy, or /copy code for the last block of code")
    if not chat.display.copy(text):
        raise UsageError("this terminal takes no clipboard codes", hint="/export talk.md writes a file")
    chat.display.note(f"{len(text):,} characters handed to the terminal's clipboard")


def _last_code(answer: str) -> str:
    blocks = code_blocks(answer)
    if not blocks:
        raise UsageError("the last answer has no block of code", hint="/copy copies all of it")
    return blocks[-1]


def _complete_path(_: Chat, argument: str) -> Iterable[str]:
    home = os.path.expanduser("~")  # noqa: PTH111 - the prefix is text
    pattern = home + argument[1:] if argument.startswith("~") else argument
    for found in sorted(glob.glob(glob.escape(pattern) + "*")):  # noqa: PTH207 - the user's own form of a path
        shown = "~" + found[len(home) :] if argument.startswith("~") else found
        yield shown + (os.sep if Path(found).is_dir() else "")


def _complete_copy(_: Chat, __: str) -> Iterable[str]:
    return ("code",)


FILES = (
    SlashCommand(
        name="file", arguments="[PATH|none]", help="Attach a text, HTML or PDF file to your message.", handler=_file,
        complete=_complete_path, takes_path=True,
    ),
    SlashCommand(
        name="export", arguments="FILE", help="Write the conversation as .md, .json, .jsonl or .html.",
        handler=_export, complete=_complete_path, takes_path=True,
    ),
    SlashCommand(
        name="copy", arguments="[code]", help="Copy the last answer, or its last block of code.", handler=_copy,
        complete=_complete_copy,
    ),
)  # fmt: skip
