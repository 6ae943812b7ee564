"""The list of sessions, as `trimkv sessions list` and `/sessions` print it."""

from __future__ import annotations

import time

from trimkv_cli.chat.store import SessionStore
from trimkv_cli.errors import InputError
from trimkv_cli.ui.plain import columns, neutralise


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
