"""Mistakes of stored sessions: files that are lost, mixed up or readable by others, and caches of another engine."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.talking import begin, never
from trimkv_cli.chat.autosave import Autosave
from trimkv_cli.chat.conversation import Conversation
from trimkv_cli.chat.export import FORMS, export
from trimkv_cli.chat.store import SessionStore, Transcript
from trimkv_cli.chat.turns import Turn, split_thought
from trimkv_cli.errors import InputError, UsageError


@pytest.fixture
def store(tmp_path: Path) -> SessionStore:
    return SessionStore(tmp_path / "sessions")


def say(conversation: Conversation, autosave: Autosave, text: str) -> Turn:
    for _ in conversation.say(text, never):
        pass
    autosave.save(conversation)
    return conversation.turns[-1]


def keep(store: SessionStore, **more: Any) -> Autosave:
    return Autosave(store, options={}, **more)


def test_a_session_goes_on_as_if_it_had_never_been_left(llm: Any, store: SessionStore) -> None:
    """Catches a cache, a seed or a last token that a session does not bring back, and turns that are read again."""
    talk, saved = begin(llm), keep(store, name="cat")
    say(talk, saved, "My cat is called Zubo.")
    say(talk, saved, "My dog is called Rex. " * 6)
    saved.fork("left", talk)
    want = say(talk, saved, "What is my cat called?")
    saved.close()
    talk.clear()
    assert len(store.read("cat").turns) == 2  # the fork left it as it was
    again, reading = begin(llm, params=replace(talk.params, seed=99)), keep(store)
    assert reading.open("cat", again) is None
    before = llm.stats.prefill_tokens
    assert say(again, reading, "What is my cat called?") == want
    assert llm.stats.prefill_tokens - before == want.prompt_tokens
    assert reading.open("left", again) is None
    assert again.turns[2] == want
    reading.close()


def test_undo_reaches_back_over_a_restart_and_no_further_than_asked(llm: Any, store: SessionStore) -> None:
    """Catches snapshots that are not on disk, too many of them, and files that no transcript names."""
    talk, saved = begin(llm, undo_depth=2), keep(store, name="deep")
    turns = [say(talk, saved, f"My cat number {n} is called Zubo.") for n in range(5)]
    saved.close()
    talk.clear()
    files = {path.name for path in (store.folder / "deep").iterdir()}
    assert files == {"session.json", *store.read("deep").states.values()}
    assert sorted(store.read("deep").states) == [3, 4, 5]
    again, reading = begin(llm, undo_depth=2), keep(store)
    reading.open("deep", again)
    again.undo(2)
    reading.write(again)
    assert not again.must_reread
    assert say(again, reading, turns[3].user) == turns[3]
    again.undo(2)
    assert again.must_reread
    reading.close()


def test_a_cache_that_does_not_match_is_read_again_with_a_reason(llm: Any, store: SessionStore) -> None:
    """Catches answers from a cache that other sizes made or that belongs to another text."""
    talk, saved = begin(llm), keep(store, name="a")
    say(talk, saved, "My cat is called Zubo.")
    saved.close()
    talk.clear()
    (file,) = store.read("a").states.values()
    path = store.folder / "a" / file
    whole = path.read_bytes()
    for damage, reason in (
        (whole.replace(b'"kv_budget\\": \\"40', b'"kv_budget\\": \\"41'), "another --kv-budget"),
        (whole[:-50], "cannot read"),
        (None, "cannot read"),
    ):
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage)
        again, reading = begin(llm), keep(store)
        why = reading.open("a", again)
        assert why is not None
        assert reason in why
        assert again.must_reread
        reading.close()
    turn = say(again, keep(store), "What is my cat called?")
    assert turn.prompt_tokens > 30
    again.clear()
    bare, unsaved = begin(llm), keep(store, name="bare", save_cache=False)
    say(bare, unsaved, "My cat is called Zubo.")
    assert [p.name for p in (store.folder / "bare").iterdir()] == ["session.json"]
    bare.undo()
    assert not bare.must_reread
    unsaved.close()
    bare.clear()


def test_files_are_private_and_one_process_writes(llm: Any, store: SessionStore) -> None:
    """Catches transcripts that others can read, and two chats that write the same session."""
    talk, saved = begin(llm), keep(store, name="mine")
    say(talk, saved, "My cat is called Zubo.")
    folder = store.folder / "mine"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    with pytest.raises(UsageError, match="open in another chat"):
        keep(SessionStore(store.folder)).open("mine", talk)
    saved.close()
    private = keep(store, enabled=False)
    talk.clear()
    say(talk, private, "My cat is called Zubo.")
    assert store.names() == ["mine"]
    private.save_as("later", talk)
    assert sorted(store.read("later").states) == [1]
    private.save_as("renamed", talk)
    assert sorted(store.names()) == ["mine", "renamed"]
    assert private.fork(None, talk) == "renamed-2"
    private.close()
    talk.clear()


def make_transcript(name: str = "x", **changes: Any) -> Transcript:
    turns = (Turn(user="<b>hi</b>", answer="<think>\nhm\n</think>\n\nyes", token_ids=(1, 2), finish_reason="stop"),)
    values: dict[str, Any] = {"name": name, "model": "m", "fingerprint": {}, "system": "s", "turns": turns} | changes
    return Transcript(**values)


def test_the_store_refuses_what_is_no_session(store: SessionStore) -> None:
    """Catches names that leave the folder, damaged files with a traceback, and copies over other sessions."""
    for name in ("../x", "", ".hidden", "a/b", "x" * 65, "a b", "end."):
        with pytest.raises(UsageError, match="no name"):
            store.path(name)
    store.create("x")
    store.write(make_transcript(states={1: "../../etc/passwd"}))
    assert store.read("x").states == {1: "passwd"}
    assert store.copy("x", store.free_name("x")) == "x-2"
    with pytest.raises(UsageError, match="already"):
        store.copy("x", "x-2")
    assert store.read("x-2") == replace(store.read("x"), name="x-2", updated=store.read("x-2").updated)
    good = json.loads((store.folder / "x" / "session.json").read_bytes())
    for bad in ("{", "[]", json.dumps(good | {"turns": [{"user": 1}]}), json.dumps(good | {"format": 9})):
        (store.folder / "x" / "session.json").write_text(bad)
        with pytest.raises(InputError, match=r"session\.json"):
            store.read("x")
    store.remove("x")
    assert store.names() == ["x-2"]
    with pytest.raises(UsageError, match="no session"):
        store.read("x")


def test_exports_hold_every_message() -> None:
    """Catches messages lost or changed, reasoning mixed into the answer, and HTML in a message that becomes markup."""
    transcript = make_transcript()
    documents = {form: export(transcript, form) for form in FORMS}
    assert all(text.endswith("\n") for text in documents.values())
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "<b>hi</b>"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
    ]
    assert json.loads(documents["jsonl"]) == {"messages": messages}
    assert json.loads(documents["json"])["messages"] == messages
    assert "<b>" not in documents["html"]
    assert "&lt;b&gt;hi&lt;/b&gt;" in documents["html"]
    assert "## You\n\n<b>hi</b>\n\n## m\n\n> hm\n\nyes\n" in documents["md"]
    with pytest.raises(UsageError, match="no form"):
        export(transcript, "docx")
    assert split_thought("hm</think>yes", inside=True) == ("hm", "yes")
    assert split_thought("no <think>x</think>") == ("", "no <think>x</think>")
