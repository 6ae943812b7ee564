"""`trimkv chat`: a conversation in the terminal, of which only new tokens are ever run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from trimkv_cli.commands.options import (
    API_KEY,
    ASCII,
    COLOR,
    ENCODING,
    LIVE,
    QUIET,
    SERVER,
    SYSTEM,
    SYSTEM_FILE,
    THINK,
    ModelName,
)
from trimkv_cli.errors import UsageError
from trimkv_cli.files import can_write
from trimkv_cli.loading.options import Beside, EngineOptions, SamplingOptions
from trimkv_cli.settings import option
from trimkv_cli.ui.look import ColourChoice, Look

if TYPE_CHECKING:
    from trimkv_cli.chat.conversation import Conversation
    from trimkv_cli.chat.store import Transcript
    from trimkv_cli.chat.talk import Talk
    from trimkv_cli.commands.chat.remote import RemoteConversation
    from trimkv_cli.commands.chat.slash_command import Chat
    from trimkv_cli.commands.warm import Server
    from trimkv_cli.ui.chat.prompt import ChatPrompt
    from trimkv_cli.ui.chat.screen import Screen


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """Which conversation it is, what is kept of it, and how it looks."""

    go_on: bool = option(False, "Go on with the last session.", short="-C", flag="--continue/--no-continue")
    session: str | None = option(None, "Go on with this session, or begin it.", "NAME")
    save_cache: bool = option(True, "Store the cache beside what is said; without it -C reads it again.", setting=True)
    undo_depth: int = option(3, "Turns whose state is kept for /undo.", "N", least=0, setting=True)
    history: bool = option(True, "Write down the lines and the session; without it nothing.", setting=True)
    system: str | None = SYSTEM
    system_file: str | None = SYSTEM_FILE
    encoding: str | None = ENCODING
    think: bool | None = THINK
    live: bool | None = LIVE
    color: ColourChoice = COLOR
    ascii: bool = ASCII
    quiet: bool = QUIET
    server: str = SERVER
    api_key: str | None = API_KEY


def chat(
    invocation: typer.Context,
    name: ModelName = None,
    *,
    chosen: ChatOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Talk with a model; the cache stays as large as it is, however long the talk.

    trimkv chat --kv-budget 256

    trimkv chat -C

    Enter sends, Ctrl-C stops an answer, Ctrl-D or /exit ends; /help lists the commands. Sessions are saved after every
    turn, with the cache; -C goes on with the last one without reading it again.

    Where a `trimkv serve` runs that was started with the same model, gates and settings, the conversation is held there
    and nothing is loaded. A server does not hand out its cache: /map, /why, /pin, /cache, /budget, /continue and
    sessions that are stored with their cache need --server off.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("chat needs a terminal", hint='in a pipeline: echo "hello" | trimkv ask')

    from trimkv_cli.commands.chat.talk import talk
    from trimkv_cli.commands.documents import Reader
    from trimkv_cli.commands.prompts import read_system
    from trimkv_cli.ui.chat.screen import Screen, keys_held_back, may_move

    stored = find_stored(chosen.session, go_on=chosen.go_on)
    said = said_options(invocation)
    engine = replace(engine, model=name or engine.model)
    if stored is not None:
        engine = as_stored(engine, stored, said=said | ({"model"} if name else set()))
    system_text = read_system(chosen.system, chosen.system_file, Reader(encoding=chosen.encoding, quiet=chosen.quiet))
    screen = Screen(
        lambda: Look.of(sys.stdout, colour=chosen.color, ascii_only=chosen.ascii),
        moves=chosen.live is not False and may_move(),
    )
    opening = Opening(options=chosen, sampling=sampling, system=system_text, said=said)
    with keys_held_back():
        server = find_server(engine, opening, stored)
        conversation, options = (
            _begin_here(engine, opening) if server is None else _begin_there(server, engine, opening)
        )
        this = open_chat(conversation, options, opening, stored, screen)
        budget_bytes = conversation.held.budget_bytes
        if stored is None and not chosen.quiet:
            screen.note("Enter sends, Ctrl-C stops an answer, Ctrl-D or /exit ends, /help lists the commands.")
        try:
            talk(this, make_prompt(this, screen, private=not chosen.history), screen)
        finally:
            this.autosave.close()
    if not chosen.quiet and this.autosave.name is not None:
        screen.note(f"trimkv chat --session {this.autosave.name} goes on with this")
    if conversation.held.budget_bytes == budget_bytes:  # no /budget, which the peak so far may exceed
        _check_budget(conversation)


# What a session does not bring back: a file may not have code loaded, and the rest is this machine's business.
_NOT_STORED = {"trust_remote_code", "offline", "max_inflight", "threads", "device"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What the command line says about the conversation itself."""

    options: ChatOptions
    sampling: SamplingOptions
    system: str | None
    said: set[str]  # the options on the command line, which replace what is stored


def said_options(invocation: typer.Context) -> set[str]:
    """Name the options that stand on the command line, unlike those from files, environment and defaults."""
    sources = {name: invocation.get_parameter_source(name) for name in invocation.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def find_stored(session: str | None, *, go_on: bool) -> Transcript | None:
    """Return the session to go on with, if there is one.

    Raises:
        UsageError: -C, and nothing is stored.
    """
    from trimkv_cli.chat.store import SessionStore

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


def find_server(engine: EngineOptions, opening: Opening, stored: Transcript | None) -> Server | None:
    """Return the server that holds the conversation: a running one that means the same, or the one that is named.

    Raises:
        UsageError: the one that is named cannot do what is asked for.
        NoAnswer: it does not answer.
    """
    chosen, sampling = opening.options, opening.sampling
    if chosen.server == "off":
        return None
    from trimkv_cli.commands.warm import find_servers

    if (own := _own_cache(opening, stored)) is not None:
        if chosen.server != "auto":
            raise UsageError(f"{own} needs --server off: a server does not hand out its cache")
        return None
    think = chosen.think
    if stored is not None:
        from trimkv_cli.chat.autosave import params_of

        think = stored.think if think is None else think
        params = params_of(stored)
        sampling = replace(sampling, top_h=_either(sampling.top_h, params.top_h))
        sampling = replace(sampling, think_budget=_either(sampling.think_budget, params.think_budget))
    found = find_servers(chosen.server, chosen.api_key, think=think, chats=True, engine=engine, sampling=sampling)
    return next(found, None)


def _own_cache(opening: Opening, stored: Transcript | None) -> str | None:
    """Say what needs the conversation's cache in this process."""
    if stored is not None and stored.states:
        return f"session {stored.name}, which was stored with its cache,"
    if "save_cache" in opening.said and opening.options.save_cache:
        return "--save-cache"
    return "--undo-depth" if "undo_depth" in opening.said else None


def _either(said: Any, stored: Any) -> Any:
    return stored if said is None else said


def _begin_here(engine: EngineOptions, opening: Opening) -> tuple[Conversation, dict[str, Any]]:
    """Load the model for a conversation; return that, and the options that open it again."""
    from trimkv_cli.chat.conversation import Conversation, need_chat
    from trimkv_cli.commands.answers import open_engine
    from trimkv_cli.commands.prompts import draw_seed, needs

    chosen, sampling = opening.options, opening.sampling
    llm = open_engine(
        replace(engine, max_inflight=1),
        quiet=chosen.quiet,
        # In memory all states to which /undo goes back, or of stored ones the copy that is written.
        beside=Beside(snapshots=2 if chosen.history and chosen.save_cache else chosen.undo_depth + 2),
        check=needs(raw=False, thinks=sampling.think_budget is not None, instead="trimkv ask --raw goes without"),
    )
    need_chat(llm.text)
    conversation = Conversation(
        llm,
        system=opening.system,
        think=chosen.think,
        params=draw_seed(sampling).resolve(llm.facts.sampling_defaults),
        undo_depth=chosen.undo_depth,
        fits_rest=sampling.max_tokens is None,
    )
    run = llm.facts.plan.run
    return conversation, _to_store(engine, {name: getattr(run, name) for name in _SOLVED})


def _begin_there(server: Server, engine: EngineOptions, opening: Opening) -> tuple[RemoteConversation, dict[str, Any]]:
    """Begin a conversation at a server; return that, and the options that open it again, also where none runs."""
    from trimkv_cli.commands.chat.remote import RemoteConversation
    from trimkv_cli.commands.prompts import draw_seed
    from trimkv_cli.commands.warm import say_before

    about, chosen, sampling = server.about, opening.options, opening.sampling
    say_before(about, notes=engine.model is None and engine.profile is None, quiet=chosen.quiet)
    conversation = RemoteConversation(
        server,
        system=opening.system,
        think=chosen.think,
        params=draw_seed(sampling).resolve(about.defaults),
        fits_rest=sampling.max_tokens is None,
    )
    known = {field.name for field in fields(EngineOptions)} - {"budget"}
    same = {name: value for name, value in about.said.items() if name in known}
    return conversation, _to_store(replace(engine, profile=None, **same), about.resolved)


def _check_budget(conversation: Conversation | RemoteConversation) -> None:
    from trimkv_cli.chat.conversation import Conversation

    if isinstance(conversation, Conversation):
        from trimkv_cli.commands.memory import check_budget

        check_budget(conversation.llm)
    else:
        from trimkv_cli.commands.warm import check_server_budget

        check_server_budget(conversation.extra)


def open_chat(
    conversation: Talk, options: dict[str, Any], opening: Opening, stored: Transcript | None, screen: Screen
) -> Chat:
    """Put a conversation together with what stores and shows it, and say what a stored one brings."""
    from trimkv_cli.chat.autosave import Autosave
    from trimkv_cli.chat.store import SessionStore
    from trimkv_cli.commands.chat.slash_command import Chat
    from trimkv_cli.commands.chat.slash_sessions import say_opened
    from trimkv_cli.commands.chat.talk import run_turn

    store = SessionStore.default()
    kept = opening.options.history and can_write(store.folder)
    if not (kept or not opening.options.history or opening.options.session):
        screen.note(f"warning: {store.folder} cannot be written: this conversation is not stored")
    autosave = Autosave(
        store,
        options=options,
        enabled=kept,
        save_cache=opening.options.save_cache,
        name=opening.options.session,
    )
    this = Chat(
        conversation=conversation,
        autosave=autosave,
        display=screen,
        encoding=opening.options.encoding,
        run=lambda begin: run_turn(this, screen, begin),
    )
    if stored is not None:
        say_opened(this, autosave.open(stored.name, conversation))
        _lay_over(this, opening)
    return this


def make_prompt(chat: Chat, screen: Screen, *, private: bool) -> ChatPrompt:
    """Return what asks for lines, with the history in the user's state folder."""
    from platformdirs import user_state_path

    from trimkv_cli.commands.chat.talk import complete
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
    conversation.think = opening.options.think if opening.options.think is not None else conversation.think
    if opening.said & {"system", "system_file"} and opening.system != conversation.system:
        conversation.system = opening.system
        if conversation.turns:
            conversation.read_again()
            chat.display.note("another system message: the next message makes the model read the session again")


_SOLVED = ("kv_budget", "prefill_chunk", "dtype", "quantize")


def _to_store(engine: EngineOptions, solved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that open the same engine again: as they were said, sizes as the plan `solved` them."""
    said = {field.name: getattr(engine, field.name) for field in fields(engine) if _differs(engine, field)}
    if engine.model is not None and Path(engine.model).exists():
        said["model"] = str(Path(engine.model).absolute())
    said |= {name: solved[name] for name in _SOLVED} | {"kv_budget": str(solved["kv_budget"])}
    return {name: value for name, value in said.items() if name not in _NOT_STORED}


def _differs(engine: EngineOptions, field: Any) -> bool:
    assert field.default is not MISSING
    return bool(getattr(engine, field.name) != field.default)
