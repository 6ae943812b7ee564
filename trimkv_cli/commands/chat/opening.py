"""What stands ready before the first line of a conversation is asked for: a stored session or a new one."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimkv_cli.chat.store import SessionStore, Transcript
from trimkv_cli.commands.prompts import draw_seed
from trimkv_cli.errors import UsageError
from trimkv_cli.files import can_write
from trimkv_cli.loading.options import EngineOptions, SamplingOptions

if TYPE_CHECKING:
    import typer

    from trimkv_cli.commands.chat.slash_command import Chat
    from trimkv_cli.engine.engine import Engine
    from trimkv_cli.ui.chat.prompt import ChatPrompt
    from trimkv_cli.ui.chat.screen import Screen

# What a session does not bring back: a file may not have code loaded, and the rest is this machine's business.
_NOT_STORED = {"trust_remote_code", "offline", "max_inflight", "threads", "device"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What the command line says about the conversation itself."""

    system: str | None
    new_system: bool  # said for this start, so that it replaces a stored one
    think: bool | None
    encoding: str | None
    sampling: SamplingOptions
    undo_depth: int
    session: str | None
    private: bool
    save_cache: bool


def said_options(invocation: typer.Context) -> set[str]:
    """Name the options that stand on the command line, unlike those from files, environment and defaults."""
    sources = {name: invocation.get_parameter_source(name) for name in invocation.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def find_stored(session: str | None, *, go_on: bool) -> Transcript | None:
    """Return the session to go on with, if there is one.

    Raises:
        UsageError: -C, and nothing is stored.
    """
    store = SessionStore.default()
    if session is not None:
        return store.read(session) if store.exists(session) else None
    if not go_on:
        return None
    names = store.names()
    if not names:
        raise UsageError("no session is stored yet", hint="trimkv chat begins one")
    return store.read(names[0])


def as_stored(engine: EngineOptions, stored: Transcript, *, said: set[str]) -> EngineOptions:
    """Take from a session what was not said on the command line."""
    known = {field.name for field in fields(EngineOptions)} - _NOT_STORED - said
    return replace(engine, **{name: value for name, value in stored.options.items() if name in known})


def open_chat(llm: Engine, engine: EngineOptions, opening: Opening, stored: Transcript | None, screen: Screen) -> Chat:
    """Put a conversation together and say what a stored one brings."""
    from trimkv_cli.chat.autosave import Autosave
    from trimkv_cli.chat.conversation import Conversation, need_chat
    from trimkv_cli.commands.chat.slash_command import Chat
    from trimkv_cli.commands.chat.slash_sessions import say_opened
    from trimkv_cli.commands.chat.talk import run_turn

    need_chat(llm.text)
    conversation = Conversation(
        llm,
        system=opening.system,
        think=opening.think,
        params=draw_seed(opening.sampling).resolve(llm.facts.sampling_defaults),
        undo_depth=opening.undo_depth,
        fits_rest=opening.sampling.max_tokens is None,
    )
    store = SessionStore.default()
    kept = not opening.private and can_write(store.folder)
    if not (kept or opening.private or opening.session):
        screen.note(f"warning: {store.folder} cannot be written: this conversation is not stored")
    autosave = Autosave(
        store,
        options=_to_store(engine, llm),
        enabled=kept,
        save_cache=opening.save_cache,
        name=opening.session,
    )
    chat = Chat(
        conversation=conversation,
        autosave=autosave,
        display=screen,
        encoding=opening.encoding,
        run=lambda begin: run_turn(chat, screen, begin),
    )
    if stored is not None:
        say_opened(chat, autosave.open(stored.name, conversation))
        _lay_over(chat, opening)
    return chat


def make_prompt(chat: Chat, screen: Screen, *, private: bool) -> ChatPrompt:
    """Return what asks for lines, with the history in the user's state folder."""
    from platformdirs import user_state_path

    from trimkv_cli.commands.chat.slash_table import complete
    from trimkv_cli.ui.chat.prompt import Candidate, ChatPrompt

    history = user_state_path("trimkv") / "chat_history"
    return ChatPrompt(
        history=None if private or not can_write(history.parent) else history,
        complete=lambda text: (Candidate(*found) for found in complete(chat, text)),
        look=screen.look,
    )


def _lay_over(chat: Chat, opening: Opening) -> None:
    """Lay what the command line says over what a session brought."""
    conversation = chat.conversation
    before = conversation.params
    params = opening.sampling.resolve(asdict(before))
    conversation.params = replace(params, ignore_eos=before.ignore_eos or params.ignore_eos)  # a flag can only add it
    conversation.think = opening.think if opening.think is not None else conversation.think
    if opening.new_system and opening.system != conversation.system:
        conversation.system = opening.system
        if conversation.turns:
            conversation.read_again()
            chat.display.note("another system message: the next message makes the model read the session again")


def _to_store(engine: EngineOptions, llm: Engine) -> dict[str, Any]:
    """Return the options that open the same engine again: as they were said, sizes as the plan solved them."""
    said = {field.name: getattr(engine, field.name) for field in fields(engine) if _differs(engine, field)}
    if engine.model is not None and Path(engine.model).is_dir():
        said["model"] = str(Path(engine.model).absolute())
    plan = llm.facts.plan
    solved = {"kv_budget": str(plan.run.kv_budget), "prefill_chunk": plan.run.prefill_chunk, "dtype": plan.run.dtype}
    return {name: value for name, value in {**said, **solved}.items() if name not in _NOT_STORED}


def _differs(engine: EngineOptions, field: Any) -> bool:
    assert field.default is not MISSING
    return bool(getattr(engine, field.name) != field.default)
