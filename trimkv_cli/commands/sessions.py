"""`trimkv sessions`: stored conversations, without loading a model."""

from __future__ import annotations

import json as jsonlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimkv_cli.commands.options import JSON, OUTPUT, CommandGroup, complete_session
from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.settings import option
from trimkv_cli.ui.plain import columns, neutralise

if TYPE_CHECKING:
    from trimkv_cli.chat.store import SessionStore

sessions_app = CommandGroup(help="Look at stored conversations, export, copy and delete them.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a session.", autocompletion=complete_session)]


@sessions_app.command(name="list")
def list_(*, json: bool = JSON) -> None:
    """List the sessions, the last one used first.

    trimkv sessions list
    """
    from trimkv_cli.chat.store import SessionStore

    store = SessionStore.default()
    if json:
        print(jsonlib.dumps({"sessions": [_facts(store.read(name)) for name in store.names()]}, indent=2))
        return
    for line in session_table(store):
        print(line)


@sessions_app.command()
def show(name: Name, *, json: bool = JSON) -> None:
    """Show what was said in a session.

    trimkv sessions show my-talk
    """
    from trimkv_cli.chat.export import export
    from trimkv_cli.chat.store import SessionStore

    session = SessionStore.default().read(name)
    _print(export(session, "json" if json else "md"), None)


@sessions_app.command(name="export")
def export_(
    name: Name,
    *,
    form: str | None = option(None, "md, json, jsonl or html; default: by the file's name, or md.", flag="--format"),
    output: str | None = OUTPUT,
) -> None:
    """Write a session as Markdown, JSON, a line of JSONL or a page of HTML.

    trimkv sessions export my-talk -o talk.html
    """
    from trimkv_cli.chat.export import export, form_of
    from trimkv_cli.chat.store import SessionStore

    chosen = form or (form_of(output) if output is not None else "md")
    _print(export(SessionStore.default().read(name), chosen), output)


@sessions_app.command()
def rm(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Names of sessions.", autocompletion=complete_session)
    ],
) -> None:
    """Delete sessions, with their saved caches.

    trimkv sessions rm my-talk another
    """
    from trimkv_cli.chat.store import SessionStore

    store = SessionStore.default()
    missing = [name for name in names if not store.path(name).is_dir()]
    if missing:
        raise UsageError(f"there is no session {missing[0]}; nothing was deleted", hint="trimkv sessions list")
    for name in names:
        store.remove(name)


@sessions_app.command()
def fork(
    name: Name, copy: Annotated[str | None, typer.Argument(metavar="COPY", help="Name of the copy.")] = None
) -> None:
    """Copy a session, so that both can go on; prints the copy's name.

    trimkv sessions fork my-talk
    """
    from trimkv_cli.chat.store import SessionStore

    store = SessionStore.default()
    print(store.copy(name, copy or store.free_name(name)))


def session_table(store: SessionStore) -> list[str]:
    """Return a heading and a line per session, the last one used first; nothing where there is none."""
    rows = [_row(store, name) for name in store.names()]
    return list(columns([("NAME", "TURNS", "MODEL", "USED", "BEGINS"), *rows])) if rows else []


def _row(store: SessionStore, name: str) -> tuple[str, ...]:
    try:
        session = store.read(name)
    except InputError:
        return (name, "?", "?", "?", "(its file is damaged)")
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(session.updated))
    first = " ".join(session.turns[0].user.split())[:40] if session.turns else ""
    return (name, str(len(session.turns)), neutralise(session.model), used, neutralise(first))


def _facts(session: Any) -> dict[str, Any]:
    values: dict[str, Any] = asdict(session)
    return {key: values[key] for key in ("name", "model", "created", "updated")} | {"turns": len(session.turns)}


def _print(text: str, output: str | None) -> None:
    from trimkv_cli.commands.prompts import open_answer

    if output is not None and Path(output).exists():
        raise UsageError(f"{output} exists", hint="take another name")
    with open_answer(output) as writer:
        writer.push(text)
        writer.close()
