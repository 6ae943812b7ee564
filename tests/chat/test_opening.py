"""Mistakes when a stored session is opened: options that win although they should not, and code loading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trimkv_cli.chat.store import SessionStore, Transcript
from trimkv_cli.commands.chat.command import as_stored, find_stored
from trimkv_cli.errors import UsageError
from trimkv_cli.loading.options import EngineOptions


def stored(**options: object) -> Transcript:
    return Transcript(name="x", model="m", fingerprint={}, options=options)


def test_the_command_line_beats_the_session_and_that_beats_the_rest() -> None:
    """Catches a model or size of the session that is lost, or that overrides what was just typed."""
    here = EngineOptions(model="typed", kv_budget="8", gates="streaming")
    opened = as_stored(here, stored(model="kept", kv_budget="64", gates="none", dtype="fp32"), said={"model"})
    assert opened == replace(here, kv_budget="64", gates="none", dtype="fp32")


def test_a_session_cannot_have_code_loaded() -> None:
    """Catches a file that switches on what only a user may, and options of other versions."""
    opened = as_stored(EngineOptions(), stored(trust_remote_code=True, device="cuda:9", nonsense=1), said=set())
    assert opened == EngineOptions()


def test_the_last_session_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Catches -C that opens another session than the last one, and a traceback where there is none."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="no session is stored"):
        find_stored(None, go_on=True)
    store = SessionStore.default()
    assert tmp_path in store.folder.parents
    for name in ("first", "second"):
        store.create(name)
        store.write(replace(stored(), name=name))
    found = find_stored(None, go_on=True)
    assert found is not None
    assert found.name == "second"
    assert find_stored("third", go_on=False) is None
    assert find_stored(None, go_on=False) is None
