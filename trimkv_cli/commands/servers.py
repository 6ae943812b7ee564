"""`trimkv ps` and `trimkv stop`: the servers of this user that run, and their end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from trimkv_cli.commands.options import JSON, QUIET
from trimkv_cli.errors import TrimkvError, UsageError
from trimkv_cli.serve.client import Client
from trimkv_cli.serve.notes import Note, running
from trimkv_cli.settings import option
from trimkv_cli.ui.plain import columns, print_note, to_json
from trimkv_cli.units import format_size

_PATIENCE_S = 1.0
_LOOK_S = 0.05
_LAST_S = 3.0
_HEADINGS = ("URL", "MODEL", "PID", "MEMORY", "ROWS", "STATE")


def ps(*, json: bool = JSON) -> None:
    """List the running servers: model, memory against the budget, rows.

    trimkv ps
    """
    found = [_state(note) for note in running()]
    if json:
        print(to_json(found))
        return
    if not found:
        print_note("no server runs; trimkv serve --detach starts one")
        return
    for line in columns([_HEADINGS, *map(_row, found)]):
        print(line)


def stop(
    port: Annotated[int | None, typer.Argument(help="Of the server; may be left out where one runs.")] = None,
    *,
    now: bool = option(False, "Do not wait for requests in flight."),
    quiet: bool = QUIET,
) -> None:
    """End a running server when its requests in flight are answered.

    trimkv stop

    trimkv stop 8012 --now
    """
    note = _chosen(running(), port)
    try:
        os.kill(note.pid, signal.SIGTERM)
        if now:
            _insist(note)
        while note.alive:
            time.sleep(_LOOK_S)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise TrimkvError(f"process {note.pid} is not ours to end", hint=f"kill {note.pid}") from None
    if not quiet:
        print_note(f"{note.about.model} at {note.url} has ended")


def _chosen(notes: Sequence[Note], port: int | None) -> Note:
    if not notes:
        raise TrimkvError("no server runs", hint="trimkv serve --detach starts one")
    if port is None and len(notes) == 1:
        return notes[0]
    found = next((note for note in notes if note.port == port), None)
    if found is None:
        listed = ", ".join(f"{note.port} ({note.about.model})" for note in notes)
        what = "several servers run" if port is None else f"no server runs at port {port}"
        raise UsageError(f"{what}: {listed}", hint=f"trimkv stop {notes[0].port}")
    return found


def _insist(note: Note) -> None:
    """Have the server drop what it does, and end it where it does not do that either."""
    end = time.monotonic() + _LAST_S
    time.sleep(_LOOK_S)  # two signals at once would be one
    os.kill(note.pid, signal.SIGTERM)
    while note.alive and time.monotonic() < end:
        time.sleep(_LOOK_S)
    if note.alive:
        os.kill(note.pid, signal.SIGKILL)


def _state(note: Note) -> dict[str, Any]:
    """Return what a server is, and what it says of itself where it answers."""
    state = {
        "url": note.url,
        "model": note.about.model,
        "pid": note.pid,
        "budget_bytes": note.about.budget_bytes,
        "kv_budget": note.about.resolved.get("kv_budget"),
    }
    try:
        health, figures = (_ask(note, path) for path in ("/health", "/metrics"))
    except TrimkvError as error:
        return {**state, "answers": False, "error": error.message}
    said = dict(_figures(str(figures)))
    health = health if isinstance(health, dict) else {}
    return {
        **state,
        "answers": True,
        "loaded": bool(health.get("loaded")),
        "running": int(said.get("requests_running", 0)),
        "waiting": int(said.get("requests_waiting", 0)),
        "rows": int(said.get("rows", 0)),
        "peak_bytes": int(said.get("peak_bytes", 0)),
        "planned_bytes": int(said.get("planned_bytes", 0)),
        "resident_bytes": _resident_bytes(note.pid),
    }


def _ask(note: Note, path: str) -> Any:
    client = Client(note.url, note.api_key, patience_s=_PATIENCE_S)
    try:
        return client.get(path)
    finally:
        client.close()


def _figures(text: str) -> Iterator[tuple[str, float]]:
    for line in text.splitlines():
        name, _, value = line.removeprefix("trimkv_").partition(" ")
        if not line.startswith("#") and value.replace(".", "", 1).isdigit():
            yield name, float(value)


def _resident_bytes(pid: int) -> int | None:
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def _row(state: dict[str, Any]) -> tuple[str, ...]:
    first = (state["url"], state["model"], str(state["pid"]))
    if not state["answers"]:
        return (*first, "-", "-", "does not answer")
    memory = format_size(state["resident_bytes"] or state["peak_bytes"])
    if state["budget_bytes"] is not None:
        memory += f" of {format_size(state['budget_bytes'])}"
    rows = f"{state['running']} of {state['rows']}"
    rows += f", {state['waiting']} waiting" if state["waiting"] else ""
    return (*first, memory, rows, "loaded" if state["loaded"] else "idle")
