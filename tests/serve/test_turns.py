"""Mistakes in going on with conversations that are sent as whole histories: what is read again, or not read at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import orjson
import pytest

from helpers.serving import Endpoint, endpoint
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions

Messages = list[dict[str, Any]]
TURNS = ("My cat is called Zubo.", "What is my cat called?", "Hello", "I like tea.", "Tell me a story.")


def load() -> Any:
    options = EngineOptions(model="mini", kv_budget="1024", prefill_chunk=32, max_inflight=2, threads=1)
    return load_engine(options)


@pytest.fixture(scope="module")
def served() -> Iterator[Endpoint]:
    engine = load()
    with endpoint(lambda: engine, kept=2) as made:
        yield made


class Talk:
    """A conversation whose client sends all of it each time."""

    def __init__(self, served: Endpoint, *before: dict[str, Any], **body: Any) -> None:
        self.served = served
        self.messages: Messages = [*before]
        self.body = {"temperature": 0, "max_tokens": 8, "return_token_ids": True, **body}
        self.seen = 0  # tokens that the row of the last turn holds

    def say(self, text: Any, **changes: Any) -> dict[str, Any]:
        """Say something; return the body, with how much the engine has read for it."""
        self.messages.append({"role": "user", "content": text})
        before = self.served.engine.stats.prefill_tokens
        response = self.served.chat(self.messages, **{**self.body, **changes})
        body: dict[str, Any] = response.json()
        assert response.status_code == 200, body
        usage = body["usage"]
        body["cache"] = response.headers["x-trimkv-cache"]
        body["cached"] = usage["prompt_tokens_details"]["cached_tokens"]
        body["read"] = self.served.engine.stats.prefill_tokens - before
        body["ids"] = body["choices"][0]["token_ids"]
        body["text"] = body["choices"][0]["message"]["content"]
        assert body["read"] + body["cached"] == usage["prompt_tokens"]
        self.messages.append({"role": "assistant", "content": body["text"]})
        body["before"], self.seen = self.seen, usage["prompt_tokens"] + usage["completion_tokens"] - 1
        return body

    def goes_on(self, text: Any, **changes: Any) -> dict[str, Any]:
        """Say something; all but what is new must have been there."""
        body = self.say(text, **changes)
        assert (body["cache"], body["cached"]) == ("continued", body["before"])
        return body


def test_of_thirty_turns_only_what_is_new_is_read(served: Endpoint) -> None:
    """Catch a turn that is read again, one that is not read at all, and memory that grows."""
    before = served.metrics()
    talk = Talk(served, max_tokens=5)
    bodies = [talk.say(TURNS[0])]
    kept: set[float] = set()
    for turn in range(1, 30):
        bodies.append(talk.goes_on(TURNS[turn % len(TURNS)]))
        kept.add(served.settled(lambda now: now["requests_running"] == 0)["kv_bytes"])
    assert bodies[0]["cache"] == "read"
    assert max(body["read"] for body in bodies) < 40
    assert bodies[-1]["usage"]["prompt_tokens"] > 350
    after = served.settled(lambda now: now["requests_total"] == before["requests_total"] + 30)
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == sum(body["read"] for body in bodies)
    assert after["continued_tokens_total"] - before["continued_tokens_total"] == sum(body["cached"] for body in bodies)
    assert len(kept) == 1


def test_a_conversation_that_goes_on_says_what_one_that_is_read_anew_does(served: Endpoint) -> None:
    """Catch tokens between turns that a template would not put there, or that are missing. Nothing is evicted here."""
    talk = Talk(served, {"role": "system", "content": "You are kind."})
    for turn, text in enumerate(TURNS):
        body = talk.say(text) if not turn else talk.goes_on(text)
        anew = served.chat(talk.messages[:-1], **talk.body, n=2).json()  # several choices never go on
        assert anew["choices"][0]["token_ids"] == body["ids"]
        assert anew["usage"]["prompt_tokens"] == body["usage"]["prompt_tokens"]


def test_conversations_take_turns_while_there_is_memory_for_them(served: Endpoint) -> None:
    """Catch one that goes on from another's row, one that is forgotten too early, and one too many that is kept."""
    talks = [Talk(served, {"role": "system", "content": f"Number {number}."}) for number in range(4)]  # 2 rows + 2 kept
    for turn, text in enumerate(TURNS[:3]):
        bodies = [talk.goes_on(text) if turn else talk.say(text) for talk in talks]
    for talk, body in zip(talks, bodies, strict=True):
        anew = served.chat(talk.messages[:-1], **talk.body, n=2).json()
        assert anew["choices"][0]["token_ids"] == body["ids"]
    assert served.settled(lambda now: now["requests_running"] == 0)["kept_conversations"] == 2
    for talk in talks[:2]:  # those that made room for the choices read anew
        assert talk.say("More?")["cache"] == "read"
    for talk in talks[2:]:
        talk.goes_on("More?")
    assert served.settled(lambda now: now["requests_running"] == 0)["kept_conversations"] == 4


def test_conversations_that_go_on_in_the_same_moment_keep_one_copy_more(served: Endpoint) -> None:
    """Catch more copies of rows than the plan counts: those that are kept, and one."""
    talks = [Talk(served, {"role": "system", "content": f"Letter {letter}."}) for letter in "abcd"]
    for talk in talks:
        talk.say("Hello")
    copies: list[int] = []
    runner = served.engine._runner
    start = runner.start

    def counted(row: Any) -> None:
        start(row)
        running = served.engine._scheduler.running.values()
        aside = [each for each in served.worker.histories._held.values() if each.state is not None]
        copies.append(len(aside) + sum(each.saved is not None for each in running))

    with mock.patch.object(runner, "start", counted), ThreadPoolExecutor(4) as pool:
        bodies = list(pool.map(lambda talk: served.chat([*talk.messages, talk.messages[-2]], max_tokens=8), talks))
    assert [body.headers["x-trimkv-cache"] for body in bodies] == ["continued"] * 4
    assert max(copies) <= 3


def test_an_edited_history_is_read_anew(served: Endpoint) -> None:
    """Catch an answer to what is no longer there."""
    talk = Talk(served)
    talk.say("My dog is called Rex.")
    talk.goes_on("I see.")
    talk.messages[0] = {"role": "user", "content": "My dog is called Max."}
    body = talk.say("What is my dog called?")
    assert (body["cache"], body["cached"]) == ("read", 0)
    talk.goes_on("I see.")


@pytest.mark.parametrize("sent", [" {}", "{}\n\n", "<think>\nhm\n</think>\n\n{}"])
def test_what_a_client_changes_in_an_answer_forces_no_new_reading(served: Endpoint, sent: str) -> None:
    """Catch a conversation that is read anew since an answer's blanks or reasoning got lost, or came back."""
    talk = Talk(served)
    said = talk.say(f"Hello {sent!r}")["text"]
    if "think" in sent:  # mini does not reason: let the kept row think that it did
        (history,) = [each for each in served.worker.histories._held.values() if each.messages[0] == talk.messages[0]]
        history.answer = {"role": "assistant", "content": sent.format(said)}
    else:
        talk.messages[-1] = {"role": "assistant", "content": sent.format(said)}
    talk.goes_on("And now?")


def test_answers_that_end_otherwise_go_on_too(served: Endpoint) -> None:
    """Catch an answer cut by its length, or at a stop string, after which the row is out of step."""
    talk = Talk(served)
    cut = talk.say("Tell me a story.", max_tokens=3)
    assert cut["choices"][0]["finish_reason"] == "length"
    stopped = talk.goes_on("Go on.", stop=["e"], max_tokens=40)
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert "e" not in stopped["text"]
    talk.goes_on("Go on.", max_tokens=1)
    talk.goes_on([{"type": "text", "text": "Go"}, {"type": "text", "text": "on."}])
    talk.goes_on("Go on.", stream_options=None)


def test_another_role_of_the_same_meaning_is_the_same(served: Endpoint) -> None:
    """Catch a developer message that is no system message in the next turn."""
    talk = Talk(served, {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]})
    talk.say("Hello")
    talk.messages[0] = {"role": "system", "content": "Be kind."}
    talk.goes_on("Hello")


def test_a_streamed_turn_goes_on_and_is_gone_on_from(served: Endpoint) -> None:
    """Catch rows that only whole answers leave."""
    messages: Messages = [{"role": "user", "content": "Hello, stream."}]
    for wanted in ("read", "continued", "continued"):
        with served.client.stream(
            "POST", "/v1/chat/completions", json={"messages": messages, "max_tokens": 8, "stream": True, "seed": 1}
        ) as response:
            assert response.headers["x-trimkv-cache"] == wanted
            text = "".join(_contents(response.iter_lines()))
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "More."}]


def _contents(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith("data: {"):
            for choice in orjson.loads(line.removeprefix("data: "))["choices"]:
                yield choice["delta"].get("content", "")


def test_a_turn_that_is_given_up_is_simply_sent_again(served: Endpoint) -> None:
    """Catch a conversation that is lost, or a row that is, when a client leaves in the middle of a turn."""
    talk = Talk(served)
    talk.say("Hello there.")
    messages: Sequence[Any] = [*talk.messages, {"role": "user", "content": "Tell me a story."}]
    for _ in range(3):
        body = {"messages": messages, "max_tokens": 900, "ignore_eos": True, "stream": True}
        with served.client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
        served.settled(lambda now: now["requests_running"] == 0)
    again = talk.say("Tell me a story.")
    assert again["cache"] == "read"
    talk.goes_on("Go on.")
    assert served.engine.free_rows + len([h for h in served.worker.histories._held.values() if h.state is None]) == 2


def test_a_turn_that_is_refused_leaves_the_conversation_as_it_was(served: Endpoint) -> None:
    """Catch a mistake in a turn that costs the whole history."""
    talk = Talk(served)
    talk.say("Hello, refusal.")
    messages = [*talk.messages, {"role": "user", "content": "x"}]
    refused = served.chat(messages, max_tokens=10**6)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_tokens")
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "exceeds the model's maximum context length" in refused.json()["error"]["message"]  # as litellm knows it
    talk.goes_on("Go on.")


def test_a_prompt_of_text_goes_on_from_a_kept_row(served: Endpoint) -> None:
    """Catch text completions that read again what a row holds, or go on a token early."""
    ids = [5, 60, 70, 80, 90, 100]
    for turn in range(3):
        body = {"prompt": ids, "max_tokens": 5, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
        response = served.client.post("/v1/completions", json=body)
        anew = served.client.post("/v1/completions", json={**body, "n": 2}).json()
        said = response.json()
        assert response.headers["x-trimkv-cache"] == ("continued" if turn else "read")
        assert said["usage"]["prompt_tokens"] == len(ids)
        assert said["usage"]["prompt_tokens_details"]["cached_tokens"] == (len(ids) - 2 if turn else 0)
        assert said["choices"][0]["token_ids"] == anew["choices"][0]["token_ids"]
        ids = [*ids, *said["choices"][0]["token_ids"], 44]


def test_without_going_on_everything_is_read(served: Endpoint) -> None:
    """Catch rows that are kept although nothing may go on from them."""
    engine = served.engine
    served.worker.ask(lambda engine: _forget(served, engine)).result()
    with endpoint(lambda: _Shared(engine), kept=0, continues=False) as other:
        talk = Talk(other)
        for text in TURNS[:3]:
            body = talk.say(text)
            assert (body["cache"], body["cached"]) == ("read", 0)
        assert other.settled(lambda now: now["requests_running"] == 0)["kept_conversations"] == 0
        assert engine.free_rows == 2


def _forget(served: Endpoint, engine: Any) -> None:
    for history in tuple(served.worker.histories._held.values()):
        if history.state is None:
            engine.kept.release(history.id)
    served.worker.histories.clear()


class _Shared:
    """An engine that another endpoint will close."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        """Leave it as it is."""
