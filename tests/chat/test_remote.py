"""Mistakes of a conversation that runs at a server: what is sent, what is kept of an answer, what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from helpers.talking import never
from trimkv_cli.chat.store import Transcript
from trimkv_cli.commands.chat.command import ChatOptions, Opening, find_server
from trimkv_cli.commands.chat.remote import RemoteConversation
from trimkv_cli.errors import TrimkvError, UsageError
from trimkv_cli.loading.options import EngineOptions, SamplingOptions
from trimkv_cli.request import SamplingParams
from trimkv_cli.serve.about import About
from trimkv_cli.serve.client import NoAnswer

URL = "http://127.0.0.1:1"


class Scripted:
    """A server that keeps what it is asked and answers with a letter a token; `breaks` ends it after so many."""

    url = URL

    def __init__(self, **about: Any) -> None:
        self.about = About(model="m", said={}, resolved={"kv_budget": 40, "device": "cpu"}, **about)
        self.bodies: list[Mapping[str, Any]] = []
        self.breaks: int | None = None
        self.seen = 0  # by the row that it keeps

    def client(self) -> Any:
        return self

    def listen(self, _: str, body: Mapping[str, Any], stopped: Callable[[], bool]) -> Iterator[dict[str, Any] | None]:
        self.bodies.append(body)
        yield None
        for place, letter in enumerate("abc"):
            if place == self.breaks:
                raise NoAnswer("gone")
            if stopped():
                return
            yield {"choices": [{"delta": {"content": letter}, "token_ids": [place]}]}
        read = 10 * len(body["messages"])
        cached, self.seen = min(self.seen, read), read + 2
        usage = {"prompt_tokens": read, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": cached}}
        cache = {"seen_tokens": self.seen, "kept_per_head": 9, "evicted": 0}
        yield {"choices": [{"delta": {}, "finish_reason": "stop"}], "trimkv": {"cache": cache}}
        yield {"choices": [], "usage": usage}


def begin(server: Any, **changes: Any) -> RemoteConversation:
    values: dict[str, Any] = {"system": None, "think": None, "params": SamplingParams(seed=5), "fits_rest": True}
    return RemoteConversation(server, **values | changes)


def say(conversation: RemoteConversation, text: str, stopped: Callable[[], bool] = never, **more: Any) -> None:
    for _ in conversation.say(text, stopped, **more):
        pass


def test_whole_histories_and_seeds_of_turns_are_sent() -> None:
    """Catch a turn or system message that is left out, a seed that repeats, and counts of another turn."""
    server = Scripted()
    conversation = begin(server, system="Be kind.")
    say(conversation, "one")
    say(conversation, "two", attempt=1)
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["Be kind.", "one", "abc", "two"]
    assert [body["seed"] for body in server.bodies] == [6, 7 + 1_000_003]
    assert not any("max_tokens" in body for body in server.bodies)
    first, second = conversation.turns
    assert (first.answer, first.token_ids, first.finish_reason) == ("abc", (0, 1, 2), "stop")
    assert (first.first, first.prompt_tokens, first.seen) == (0, 20, 22)
    assert (second.first, second.prompt_tokens, second.seen) == (22, 18, 42)
    assert (conversation.held.kept, conversation.held.seen) == (9, 42)


def test_what_is_set_is_sent() -> None:
    """Catch a limit, a penalty or a switch that a server never hears of."""
    server = Scripted()
    conversation = begin(server, think=False, params=SamplingParams(max_tokens=9, presence_penalty=1.0, stop=("x",)))
    say(conversation, "one")
    (body,) = server.bodies
    assert (body["max_tokens"], body["presence_penalty"], body["stop"]) == (9, 1.0, ["x"])
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


def test_a_server_that_breaks_off_leaves_no_turn() -> None:
    """Catch half an answer in the history, and a conversation that is over."""
    server = Scripted()
    conversation = begin(server)
    server.breaks = 2
    with pytest.raises(TrimkvError, match="gone"):
        say(conversation, "one")
    assert not conversation.turns
    server.breaks = None
    say(conversation, "two")
    assert [turn.user for turn in conversation.turns] == ["two"]


def test_what_was_stopped_stays_and_is_read_again() -> None:
    """Catch an answer that Ctrl-C takes away, and a row that is believed to be there."""
    conversation = begin(Scripted())
    asked = iter((False, True))
    say(conversation, "one", lambda: next(asked))
    (turn,) = conversation.turns
    assert (turn.answer, turn.finish_reason) == ("a", "abort")
    assert conversation.must_reread
    say(conversation, "two")
    assert not conversation.must_reread


def test_a_server_holds_nothing_of_a_history_that_was_changed() -> None:
    """Catch a user who is told that nothing has to be read, or that something has."""
    conversation = begin(Scripted())
    say(conversation, "one")
    say(conversation, "two")
    gone = conversation.undo()
    assert conversation.must_reread
    conversation.redo(gone)
    assert not conversation.must_reread
    conversation.system = "Be kind."
    assert conversation.must_reread
    conversation.clear()
    assert not conversation.must_reread
    with pytest.raises(UsageError, match="nothing has been said"):
        conversation.undo()


def test_what_a_server_was_started_with_shows_and_stays() -> None:
    """Catch a setting that is off on the screen and on at the server."""
    conversation = begin(Scripted(fixed={"top_h": 0.5, "think": True}, in_thought={"on": True}))
    assert (conversation.params.top_h, conversation.think, conversation.starts_in_thought) == (0.5, True, True)
    conversation.think = None
    with pytest.raises(UsageError, match="started with think on"):
        say(conversation, "one")


@pytest.mark.parametrize(
    ("states", "said", "what"),
    [
        ({1: "0001.kv"}, set(), "session x, which was stored with its cache,"),
        ({}, {"save_cache"}, "--save-cache"),
        ({}, {"undo_depth"}, "--undo-depth"),
    ],
)
def test_what_needs_the_cache_stays_here(states: dict[int, str], said: set[str], what: str) -> None:
    """Catch states of a session that a server's conversation would throw away, and options passed over."""
    stored = Transcript(name="x", model="m", fingerprint={}, states=states)

    def found(server: str) -> object:
        options = ChatOptions(server=server)
        opening = Opening(options=options, sampling=SamplingOptions(), system=None, said=said)
        return find_server(EngineOptions(), opening, stored)

    assert found("auto") is None
    with pytest.raises(UsageError, match=f"{what} needs --server off"):
        found(URL)
