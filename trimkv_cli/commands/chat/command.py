"""`trimkv chat`: a conversation in the terminal, of which only new tokens are ever run."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated

import typer

from trimkv_cli.commands.options import (
    Ascii,
    Color,
    Encoding,
    Live,
    ModelName,
    Quiet,
    System,
    SystemFile,
    Think,
    complete_session,
    with_options,
)
from trimkv_cli.errors import UsageError
from trimkv_cli.loading.options import EngineOptions, SamplingOptions


@with_options(engine=EngineOptions, sampling=SamplingOptions)
def chat(
    invocation: typer.Context,
    name: ModelName = None,
    *,
    go_on: Annotated[bool, typer.Option("-C", "--continue/--no-continue", help="Go on with the last session.")] = False,
    session: Annotated[
        str | None,
        typer.Option(
            "--session", help="Go on with this session, or begin it.", metavar="NAME", autocompletion=complete_session
        ),
    ] = None,
    save_cache: Annotated[
        bool,
        typer.Option(
            "--save-cache/--no-save-cache", help="Store the cache beside what is said; without it -C reads it again."
        ),
    ] = True,
    undo_depth: Annotated[
        int, typer.Option("--undo-depth", min=0, help="Turns whose state is kept for /undo.", metavar="N")
    ] = 3,
    history: Annotated[
        bool,
        typer.Option("--history/--no-history", help="Write down the lines and the session; without it nothing."),
    ] = True,
    system: System = None,
    system_file: SystemFile = None,
    encoding: Encoding = None,
    think: Think = None,
    live: Live = None,
    color: Color = "auto",
    ascii_only: Ascii = False,
    quiet: Quiet = False,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Talk with a model; the cache stays as large as it is, however long the talk.

    trimkv chat --kv-budget 256

    trimkv chat -C

    Enter sends, Ctrl-C stops an answer, Ctrl-D or /exit ends; /help lists the commands. Sessions are saved after every
    turn, with the cache; -C goes on with the last one without reading it again.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("chat needs a terminal", hint='in a pipeline: echo "hello" | trimkv ask')

    from trimkv_cli.commands.answers import open_engine
    from trimkv_cli.commands.chat.opening import Opening, as_stored, find_stored, make_prompt, open_chat, said_options
    from trimkv_cli.commands.chat.talk import talk
    from trimkv_cli.commands.documents import Reader
    from trimkv_cli.commands.memory import check_budget
    from trimkv_cli.commands.prompts import needs, read_system
    from trimkv_cli.ui.chat.screen import Screen, keys_held_back, may_move
    from trimkv_cli.ui.look import Look

    stored = find_stored(session, go_on=go_on)
    said = said_options(invocation)
    engine = replace(engine, model=name or engine.model, max_inflight=1)
    if stored is not None:
        engine = as_stored(engine, stored, said=said | ({"model"} if name else set()))
    system_text = read_system(system, system_file, Reader(encoding=encoding, quiet=quiet))
    screen = Screen(
        lambda: Look.of(sys.stdout, colour=color, ascii_only=ascii_only), moves=live is not False and may_move()
    )
    opening = Opening(
        system=system_text,
        new_system=bool(said & {"system", "system_file"}),
        think=think,
        encoding=encoding,
        sampling=sampling,
        undo_depth=undo_depth,
        session=session,
        private=not history,
        save_cache=save_cache,
    )
    # In memory all states to which /undo goes back, or of stored ones the copy that is written.
    snapshots = 2 if history and save_cache else undo_depth + 2
    with keys_held_back():
        llm = open_engine(
            engine, quiet=quiet, snapshots=snapshots, check=needs(raw=False, instead="trimkv ask --raw goes without")
        )
        this = open_chat(llm, engine, opening, stored, screen)
        budget_bytes = this.conversation.llm.facts.plan.budget_bytes
        if stored is None and not quiet:
            screen.note("Enter sends, Ctrl-C stops an answer, Ctrl-D or /exit ends, /help lists the commands.")
        try:
            talk(this, make_prompt(this, screen, private=not history), screen)
        finally:
            this.autosave.close()
    if not quiet and this.autosave.name is not None:
        screen.note(f"trimkv chat --session {this.autosave.name} goes on with this")
    if this.conversation.llm.facts.plan.budget_bytes == budget_bytes:  # no /budget, which the peak so far may exceed
        check_budget(this.conversation.llm)
