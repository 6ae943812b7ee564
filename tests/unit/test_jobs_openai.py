"""Mistakes that a user of the openai package would meet: bodies that we refuse, answers that it cannot read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessageFunctionToolCall,
    ChatCompletionToolParam,
)
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams
from openai.types.shared_params import ResponseFormatJSONSchema

from helpers.fake_engine import RECORDER, FakeEngine, FakeTemplate, FakeText, run
from helpers.tiny_tokenizers import HERMES
from trimkv_cli.events import Answer, FinishReason, TokenEvent, TokenLogprob
from trimkv_cli.jobs.chunks import Chunks
from trimkv_cli.jobs.lines import Item, Rules, parse_body
from trimkv_cli.jobs.requests import make_requests
from trimkv_cli.jobs.tool_calls import answer_message
from trimkv_cli.request import Request


class ScoringEngine(FakeEngine):
    """Report log probabilities as an engine does."""

    def step(self) -> list[TokenEvent]:
        said = TokenLogprob(logprob=-0.5, top=((97, -0.5), (0x20AC, -float("inf"))))
        return [replace(event, logprobs=(said,) * len(event.token_ids)) for event in super().step()]


def answer(url: str, body: Any) -> dict[str, Any]:
    line = {"custom_id": "a", "method": "POST", "url": url, "body": body}
    [record], summary = run([line], engine=ScoringEngine(text=FakeText(), max_rows=4), strict=True)
    assert record["response"]["status_code"] == 200, record
    assert summary.warnings == {}
    found: dict[str, Any] = record["response"]["body"]
    return found


def test_a_chat_body_of_the_client_is_accepted_and_its_answer_is_read_by_it() -> None:
    """Every parameter that is honoured, and every one that changes nothing here, none of them a warning."""
    body: CompletionCreateParamsNonStreaming = {
        "model": "any",
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None},
            {"role": "user", "content": "d"},
        ],
        "frequency_penalty": 0.5,
        "logit_bias": {"97": 3},
        "logprobs": True,
        "max_completion_tokens": 3,
        "metadata": {"a": "b"},
        "n": 2,
        "parallel_tool_calls": False,
        "presence_penalty": -0.5,
        "response_format": {"type": "text"},
        "seed": 4,
        "service_tier": "auto",
        "stop": ["x", "y"],
        "store": False,
        "stream": False,
        "temperature": 0.5,
        "top_logprobs": 2,
        "top_p": 0.9,
        "user": "someone",
    }
    ours = answer("/v1/chat/completions", body)
    parsed = ChatCompletion.model_validate(ours, strict=True)
    assert [choice.index for choice in parsed.choices] == [0, 1]
    assert parsed.usage is not None
    assert parsed.usage.total_tokens == parsed.usage.prompt_tokens + 6
    logprobs = parsed.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [(top.token, top.logprob, top.bytes) for top in logprobs.content[0].top_logprobs] == [
        ("a", -0.5, [97]),
        ("€", -9999.0, list("€".encode())),
    ]
    assert json.loads(parsed.to_json()).keys() == ours.keys()


def test_a_format_of_the_client_is_accepted() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    response_format: ResponseFormatJSONSchema = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True, "description": "a number"},
    }
    body = {"messages": [{"role": "user", "content": "d"}], "response_format": response_format}
    ChatCompletion.model_validate(answer("/v1/chat/completions", body), strict=True)


def test_a_text_body_of_the_client_is_accepted_and_its_answer_is_read_by_it() -> None:
    body: TextParams = {
        "model": "any",
        "prompt": "ab",
        "best_of": 1,
        "echo": False,
        "frequency_penalty": 0,
        "logit_bias": None,
        "logprobs": 2,
        "max_tokens": 2,
        "n": 1,
        "presence_penalty": 0,
        "seed": None,
        "stop": None,
        "stream": False,
        "suffix": None,
        "temperature": 1,
        "top_p": 1,
        "user": "someone",
    }
    parsed = Completion.model_validate(answer("/v1/completions", body), strict=True)
    assert parsed.choices[0].text == "ab"
    logprobs = parsed.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.text_offset) == (["a", "b"], [0, 1])
    assert logprobs.top_logprobs == [{"a": -0.5, "€": -9999.0}] * 2


# The lines of vLLM's documentation of `run-batch`, as they stand there.
VLLM = r"""
{"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "meta-llama/Meta-Llama-3-8B-Instruct", "messages": [{"role": "system", "content": "You are a helpful assistant."},{"role": "user", "content": "Hello world!"}],"max_completion_tokens": 1000}}
{"custom_id": "request-2", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "meta-llama/Meta-Llama-3-8B-Instruct", "messages": [{"role": "system", "content": "You are an unhelpful assistant."},{"role": "user", "content": "Hello world!"}],"max_completion_tokens": 1000}}
"""  # noqa: E501


def test_the_examples_of_vllm_run_unchanged() -> None:
    lines = VLLM.strip().splitlines()
    records, summary = run(lines, engine=FakeEngine(text=FakeText(), max_positions=5000), order="input")
    assert [record["custom_id"] for record in records] == ["request-1", "request-2"]
    assert (summary.done, summary.errors, dict(summary.warnings)) == (2, 0, {})
    for record in records:
        ChatCompletion.model_validate(record["response"]["body"], strict=True)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream": True}, "stream"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
            "response_format",
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    line = {"url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "a"}], **body}}
    [record], _ = run([line])
    error = record["response"]["body"]["error"]
    assert (record["response"]["status_code"], error["param"], record["error"]) == (400, param, None)


class CallingText(FakeText):
    """A template of Hermes' form."""

    template = FakeTemplate(HERMES)


class ScriptedEngine(FakeEngine):
    """Say the same whatever is asked, one character a step."""

    def __init__(self, script: str, reason: FinishReason = "stop") -> None:
        super().__init__(text=CallingText(), max_rows=4)
        self.script, self.reason = script, reason

    def add(self, request: Request) -> None:
        params = replace(request.params, max_tokens=len(self.script))
        super().add(replace(request, prompt_token_ids=tuple(map(ord, self.script)), params=params))

    def step(self) -> list[TokenEvent]:
        events = super().step()
        return [replace(event, finish_reason=self.reason) if event.finish_reason else event for event in events]


TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}},
}
NOW = '<tool_call>\n{"name": "now", "arguments": {"zone": "CET"}}\n</tool_call>'

THEN = NOW.replace("now", "then")


def scripted(script: str, reason: FinishReason = "stop", **body: Any) -> tuple[ChatCompletion, dict[str, Any]]:
    line = {"url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "When?"}], **body}}
    [record], _ = run([line], engine=ScriptedEngine(script, reason), strict=True)
    assert record["response"]["status_code"] == 200, record
    ours = record["response"]["body"]
    return ChatCompletion.model_validate(ours, strict=True), ours


def test_calls_are_read_by_the_client_and_sent_back_by_it() -> None:
    parsed, _ = scripted(NOW, tools=[TOOL], n=2)
    for choice in parsed.choices:
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert isinstance(call, ChatCompletionMessageFunctionToolCall)
        assert (call.function.name, json.loads(call.function.arguments)) == ("now", {"zone": "CET"})
    first, second = (choice.message.tool_calls for choice in parsed.choices)
    assert first is not None
    assert second is not None
    assert first[0].id != second[0].id
    said = parsed.choices[0].message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": first[0].id, "content": "Noon."}
    again, _ = scripted("At noon.", messages=[{"role": "user", "content": "When?"}, said, result], tools=[TOOL])
    assert (again.choices[0].message.content, again.choices[0].finish_reason) == ("At noon.", "stop")
    assert again.choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    ("script", "reason", "body", "content", "finish", "code"),
    [
        ("Let me see. " + NOW, "stop", {"tools": [TOOL]}, "Let me see.", "tool_calls", None),
        ("Let me see. " + NOW[:-25], "length", {"tools": [TOOL]}, "Let me see.", "length", "tool_call_incomplete"),
        (THEN, "stop", {"tools": [TOOL]}, THEN, "stop", "tool_call_as_text"),
        (NOW, "stop", {"tools": [TOOL], "tool_choice": "none"}, NOW, "stop", None),
        (NOW, "stop", {}, NOW, "stop", None),
    ],
)
def test_what_is_said_beside_calls_is_the_content(
    script: str, reason: FinishReason, body: Any, content: str, finish: str, code: str | None
) -> None:
    """Catches text that is lost beside a call, calls read where none were offered, and cut ones handed out as whole."""
    parsed, ours = scripted(script, reason, **body)
    choice = parsed.choices[0]
    assert (choice.message.content, choice.finish_reason) == (content, finish)
    assert [warning["code"] for warning in ours["trimkv"]["warnings"]] == ([] if code is None else [code])


def test_a_template_of_another_form_is_warned_of_and_cannot_be_forced() -> None:
    """Catches a choice that is ignored without a word."""
    line = {"url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "a"}], "tools": [TOOL]}}
    [record], summary = run([line])
    assert [warning["code"] for warning in record["response"]["body"]["trimkv"]["warnings"]] == ["tool_calls_as_text"]
    assert sum(summary.warnings.values()) == 1
    [record], _ = run([{**line, "body": {**line["body"], "tool_choice": "required"}}])  # type: ignore[dict-item]
    assert record["response"]["body"]["error"]["param"] == "tool_choice"


def test_a_stream_says_what_the_whole_answer_does() -> None:
    """Catches deltas that the client cannot join, and a stream that ends otherwise than the answer."""
    body = {"messages": [{"role": "user", "content": "When?"}], "tools": [TOOL], "n": 2, "logprobs": True}
    script = "Let me see. " + NOW + "\n" + NOW
    item = parse_body(1, body, "chat", Rules(), custom_id="a")
    assert isinstance(item, Item)
    engine = ScriptedEngine(script)
    requests = make_requests(item, engine.text)
    assert isinstance(requests, list)
    answers = [Answer(request) for request in requests]
    chunks = Chunks(RECORDER, item, engine.text, include_usage=False)
    sent = chunks.opening()
    for request in requests:
        engine.add(request)
    said = TokenLogprob(logprob=-0.5, top=())
    while engine.has_work:
        for event in engine.step():
            scored = replace(event, logprobs=(said,) * len(event.token_ids))
            index = [request.id for request in requests].index(event.request_id)
            answers[index].take(scored)
            sent += chunks.piece(index, scored)
    sent += chunks.closing(sent.pop(), answers)
    parsed = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in sent]
    whole = ChatCompletion.model_validate(RECORDER.body(item, answers, engine.text), strict=True)
    for wanted in whole.choices:
        content, calls, scores, reason = "", dict[int, list[str]](), 0, None
        for choice in (choice for chunk in parsed for choice in chunk.choices if choice.index == wanted.index):
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            scores += len(choice.logprobs.content or ()) if choice.logprobs else 0
            for call in choice.delta.tool_calls or ():
                assert call.function is not None
                known = calls.setdefault(call.index, [call.id or "", call.function.name or "", ""])
                known[2] += call.function.arguments or ""
        assert (content, reason, scores) == (wanted.message.content, wanted.finish_reason, len(script))
        assert list(calls.values()) == [
            [call.id, call.function.name, call.function.arguments]
            for call in wanted.message.tool_calls or ()
            if isinstance(call, ChatCompletionMessageFunctionToolCall)
        ]
        assert len(calls) == 2


def test_an_answer_is_the_message_that_comes_back_of_it() -> None:
    """Catches a conversation that is read anew because its calls are told apart from themselves."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "When?"}], "tools": [TOOL]}
    item = parse_body(1, body, "chat", Rules(), custom_id="a")
    assert isinstance(item, Item)
    said = scripted("Well. " + NOW, seed=item.params.seed, **body)[0].choices[0].message.model_dump(exclude_none=True)
    again = parse_body(2, {**body, "messages": [*body["messages"], said]}, "chat", Rules(), custom_id="b")
    assert isinstance(again, Item)
    assert again.messages is not None
    assert again.messages[1] == answer_message(item, HERMES, "Well. " + NOW)
