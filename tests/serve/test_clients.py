"""Mistakes that released clients meet at a real server: bodies and events that their own types refuse, other tokens."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from helpers.programs import Run
from helpers.serving import Served, served, settled

OPTIONS = ("mini", "--threads", "1", "--kv-budget", "64", "--prefill-chunk", "32", "--deterministic", "--rows", "3")
ASKED = [{"role": "user", "content": "My cat is called Zubo. What is my cat called?"}]
SAMPLED = {"max_tokens": 8, "temperature": 3.0, "seed": 5}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve mini in a process of its own, which ends as it should."""
    with served(tmp_path_factory.mktemp("server"), *OPTIONS) as found:
        yield found
        code, said = found.end(signal.SIGTERM)
        assert code == 0, said
        assert "Traceback" not in said


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def strictly(kind: type[BaseModel], value: dict[str, Any]) -> Any:
    """Take a body as the client's types say it is, with nothing more than `trimkv` and token ids beside."""
    parsed = kind.model_validate(value, strict=True)
    for model in _models(parsed):
        assert set(model.model_extra or {}) <= {"trimkv", "token_ids", "logprobs", "usage"}, model
    return parsed


def _models(value: Any) -> Iterator[BaseModel]:
    if isinstance(value, BaseModel):
        yield value
        for name in type(value).model_fields:
            yield from _models(getattr(value, name))
    elif isinstance(value, list):
        for each in value:
            yield from _models(each)


def post(server: Served, path: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def events(server: Served, path: str, **body: Any) -> list[dict[str, Any]]:
    said = httpx.post(f"{server.url}/v1/{path}", json={**body, "stream": True}, timeout=60)
    assert said.status_code == 200, said.text
    *lines, done = [line.removeprefix("data: ") for line in said.text.splitlines() if line]
    assert done == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_stream_says_what_the_whole_answer_says(server: Served) -> None:
    """Catch a piece, a log probability or a token that one of the two loses; the client's types hold both."""
    body = {"messages": ASKED, **SAMPLED, "n": 3, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
    whole = strictly(ChatCompletion, post(server, "chat/completions", **body))
    pieces = events(server, "chat/completions", **body, stream_options={"include_usage": True})
    chunks = [strictly(ChatCompletionChunk, piece) for piece in pieces]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) > 1
    *others, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in others)
    assert {chunk.id for chunk in chunks} == {last.id}
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in others if chunk.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(each.delta.content or "" for each in mine) == choice.message.content
        assert [token for each in mine for token in getattr(each, "token_ids", [])] == choice.token_ids
        scores = [score for each in mine if each.logprobs for score in each.logprobs.content or []]
        assert [score.model_dump() for score in scores] == [score.model_dump() for score in choice.logprobs.content]
        assert [each.finish_reason for each in mine if each.finish_reason] == [choice.finish_reason]


def test_a_streamed_text_completion_says_what_the_whole_one_says(server: Served) -> None:
    """Catch offsets that begin anew with every piece."""
    body = {"prompt": "My cat is", **SAMPLED, "n": 2, "logprobs": 2}
    whole = strictly(Completion, post(server, "completions", **body))
    pieces = events(server, "completions", **body)
    ends = [choice["finish_reason"] for piece in pieces for choice in piece["choices"]]
    assert sorted(end for end in ends if end) == sorted(choice.finish_reason for choice in whole.choices)
    for piece in pieces:  # in the API's streams it is null until the end, whatever the client's type says
        piece["choices"] = [
            {**choice, "finish_reason": choice["finish_reason"] or "stop"} for choice in piece["choices"]
        ]
    chunks = [strictly(Completion, piece) for piece in pieces]
    for choice in whole.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.text for each in mine) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [part for each in mine if each.logprobs for part in getattr(each.logprobs, name)]
            assert parts == getattr(choice.logprobs, name), name
    assert all(chunk.choices for chunk in chunks)  # no usage was asked for: none is empty


def test_the_client_streams_and_reads_all_at_once(client: openai.OpenAI) -> None:
    """Catch what the released client cannot do with this server."""
    how = {"model": "mini", "messages": ASKED, "extra_body": {"ignore_eos": True}, **SAMPLED}
    whole = client.chat.completions.create(**how)
    with client.chat.completions.create(**how, stream=True) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    ends: dict[str, Any] = {"model": "mini", "messages": ASKED, "temperature": 0, "max_tokens": 20}
    with client.chat.completions.stream(**ends) as helper:
        final = helper.get_final_completion()
    said = client.chat.completions.create(**ends).choices[0]
    assert (final.choices[0].message.content, said.finish_reason) == (said.message.content, "stop")
    stopped = client.completions.create(
        model="mini", prompt="My cat is", stop=["e"], logit_bias={"300": -100}, **SAMPLED
    )
    assert "e" not in stopped.choices[0].text
    assert [model.id for model in client.models.list()] == ["mini"]
    assert client.models.retrieve("mini").owned_by == "trimkv"


def test_the_client_at_once_with_itself(server: Served) -> None:
    """Catch answers that are mixed up, or that what runs beside them changes: each seed says the same again."""

    async def work() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def say(seed: int) -> str:
                how: dict[str, Any] = {**SAMPLED, "seed": seed % 4, "max_tokens": 3 + seed % 4}
                stream = await client.chat.completions.create(model="mini", messages=ASKED, stream=True, n=2, **how)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            said = await asyncio.gather(*map(say, range(8)))
            assert [sorted(text) for text in said[:4]] == [sorted(text) for text in said[4:]]

    asyncio.run(asyncio.wait_for(work(), 60))


def test_an_answer_follows_a_schema(client: openai.OpenAI) -> None:
    """Catch a schema that is read and not followed."""

    class Cat(BaseModel):
        name: Literal["Zubo", "Rex"]
        alive: bool

    parsed = client.chat.completions.parse(
        model="mini", messages=ASKED, response_format=Cat, max_tokens=60, temperature=0.5, seed=2
    )
    assert isinstance(parsed.choices[0].message.parsed, Cat)
    kind = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["Zubo", "Rex"]}, "strict": True}}
    said = client.chat.completions.create(model="mini", messages=ASKED, response_format=kind, max_tokens=30)  # type: ignore[call-overload]
    assert json.loads(said.choices[0].message.content) in ("Zubo", "Rex")


def test_the_client_s_errors_are_its_own(client: openai.OpenAI) -> None:
    """Catch a refusal that the client takes for a fault of the network, or tries again."""
    ask = partial(client.chat.completions.create, model="mini", messages=ASKED)
    with pytest.raises(openai.BadRequestError) as caught:
        ask(temperature=-1)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as caught:
        ask(max_completion_tokens=10**6)
    assert (caught.value.param, caught.value.code) == ("max_completion_tokens", "context_length_exceeded")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="mini", input="a")


def test_curl_does(server: Served) -> None:
    """Catch what the README shows and does not work: no type of content, an answer that does not end as it comes."""
    url = f"{server.url}/v1/chat/completions"
    body = json.dumps({"messages": ASKED, **SAMPLED})
    done = subprocess.run(["curl", "-sS", url, "-d", body], capture_output=True, check=True, timeout=60)
    whole = strictly(ChatCompletion, json.loads(done.stdout))
    body = json.dumps({"messages": ASKED, **SAMPLED, "stream": True})
    done = subprocess.run(["curl", "-sSN", "--http1.0", url, "-d", body], capture_output=True, check=True, timeout=60)
    pieces = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith(b"data: {")]
    said = "".join(choice["delta"].get("content", "") for piece in pieces for choice in piece["choices"])
    assert said == whole.choices[0].message.content


@pytest.mark.parametrize("greedy", [True, False])
def test_its_tokens_are_those_of_run_and_ask(server: Served, greedy: bool, tmp_path: Path, here: Run) -> None:
    """Catch an endpoint that renders, pins, cuts or draws otherwise than the commands do."""
    how = {**SAMPLED, **({"temperature": 0} if greedy else {})}
    said = post(server, "chat/completions", messages=ASKED, return_token_ids=True, **how)["choices"][0]
    line = {"messages": ASKED, "return_token_ids": True, **how}
    (tmp_path / "in.jsonl").write_text(json.dumps(line) + "\n")
    options = [option for option in OPTIONS if option != "mini"]
    ran = here("run", tmp_path / "in.jsonl", "-o", "-", "-m", "mini", "-q", *options)
    record = json.loads(ran.stdout)["response"]["body"]["choices"][0]
    assert record["token_ids"] == said["token_ids"]
    flags = [f"--temperature={how['temperature']}", f"--max-tokens={how['max_tokens']}", f"--seed={how['seed']}"]
    asked = here("ask", ASKED[0]["content"], "-m", "mini", "-q", *flags, *options)
    assert asked.stdout.decode().rstrip("\n") == said["message"]["content"].rstrip("\n")


def test_what_runs_is_counted(server: Served) -> None:
    """Catch a metric that Prometheus cannot read, and rows that are not free in the end."""
    text = httpx.get(f"{server.url}/metrics").text
    helped = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")]
    typed = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    named = [line.split()[0] for line in text.splitlines() if not line.startswith("#")]
    assert helped == typed == named
    now = settled(server.metrics, lambda now: now["requests_running"] == 0)
    assert (now["rows"], now["requests_waiting"], now["loaded"]) == (3, 0, 1)
    assert now["kv_bytes"] > 0
