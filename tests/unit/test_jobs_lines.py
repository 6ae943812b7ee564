"""Mistakes in telling good lines from bad ones, and in what a bad one is told."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimkv_cli.jobs.bodies import HARMLESS
from trimkv_cli.jobs.lines import BadLine, Item, Rules, derive_seed, id_of, parse_line
from trimkv_cli.jobs.reading import Line
from trimkv_cli.jobs.selection import parse_lines
from trimkv_cli.request import SamplingParams

USER = [{"role": "user", "content": "hi"}]


def parse(data: Any, **rules: Any) -> Item | BadLine:
    text = data if isinstance(data, str) else json.dumps(data)
    return parse_line(Line(number=17, text=text), Rules(**rules))


def item(data: Any, **rules: Any) -> Item:
    parsed = parse(data, **rules)
    assert isinstance(parsed, Item), parsed
    return parsed


def bad(data: Any, **rules: Any) -> BadLine:
    parsed = parse(data, **rules)
    assert isinstance(parsed, BadLine), parsed
    assert parsed.line == 17
    return parsed


def chat(**body: Any) -> dict[str, Any]:
    body = {"messages": USER, **body}
    return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}


def test_an_openai_chat_line() -> None:
    parsed = item(chat(model="m", max_tokens=64, temperature=0, seed=7, stop="x", n=1, stream=False, user="u"))
    assert (parsed.custom_id, parsed.kind, parsed.messages) == ("a", "chat", ({"role": "user", "content": "hi"},))
    assert parsed.params == SamplingParams(max_tokens=64, temperature=0.0, seed=7, stop=("x",))
    assert parsed.warnings == ()


def test_an_openai_completion_line() -> None:
    line = {"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "Once", "stop": ["a", "b"]}}
    parsed = item(line)
    assert (parsed.kind, parsed.prompt, parsed.params.stop) == ("completion", "Once", ("a", "b"))


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2, 3]]])
def test_a_prompt_may_be_token_ids(prompt: Any) -> None:
    parsed = item({"custom_id": "b", "url": "/v1/completions", "body": {"prompt": prompt}})
    assert parsed.prompt is None
    assert parsed.prompt_token_ids == (1, 2, 3)


def test_a_simple_line_and_its_keys_beat_the_flags() -> None:
    defaults = SamplingParams(max_tokens=5, temperature=0.5, top_k=40, ignore_eos=True)
    line = {"prompt_token_ids": [1], "id": 12, "temperature": 0.1, "top_k": -1, "return_token_ids": True, "top_p": None}
    parsed = item(line, defaults=defaults)
    assert parsed.custom_id == "12"
    assert parsed.return_token_ids
    assert parsed.params == SamplingParams(
        max_tokens=5, temperature=0.1, top_k=0, ignore_eos=True, seed=derive_seed(0, "12")
    )


def test_a_text_line_is_a_prompt_as_it_stands() -> None:
    parsed = item('  {"prompt": 1} ', text=True)
    assert (parsed.prompt, parsed.custom_id, parsed.kind) == ('  {"prompt": 1} ', "line-17", "text")


def test_messages_become_what_templates_know() -> None:
    messages = [
        {"role": "developer", "content": "be brief", "name": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": []},
        {"role": "user", "content": ""},
    ]
    assert item({"messages": messages}).messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": ""},
    )


def test_a_value_that_two_keys_forbid_together_is_named() -> None:
    """Catches a 400 that names no parameter, and a line that only the run refuses although it can be seen before."""
    json_object = {"type": "json_object"}
    assert bad(chat(response_format=json_object, ignore_eos=True)).param == "response_format"


@pytest.mark.parametrize(
    ("body", "param", "instead"),
    [
        (
            {"messages": [*USER, {"role": "assistant", "content": None, "function_call": {"name": "w"}}]},
            "messages[1]",
            "tool_calls",
        ),
        ({"messages": [*USER, {"role": "function", "name": "w", "content": "sunny"}]}, "messages[1].role", "role tool"),
        ({"functions": [{"name": "w"}]}, "functions", "give tools"),
        ({"function_call": {"name": "w"}}, "function_call", "give tool_choice"),
    ],
)
def test_the_earlier_form_of_tools_is_refused_with_what_to_give_instead(
    body: dict[str, Any], param: str, instead: str
) -> None:
    """Catches a message that blames the content of an assistant's message for a call in it."""
    refused = bad(chat(**body))
    assert (refused.status, refused.param) == (400, param)
    assert instead in refused.message


def test_two_names_of_a_length_may_say_the_same() -> None:
    assert item(chat(max_tokens=4, max_completion_tokens=4.0)).params.max_tokens == 4


def test_empty_lists_of_tools_say_nothing() -> None:
    messages = [*USER, {"role": "assistant", "content": "c", "tool_calls": [], "function_call": None}]
    assert item(chat(messages=messages, tools=[], tool_choice="none"), strict=True).warnings == ()


def test_thinking_is_passed_to_the_template() -> None:
    assert item({"messages": USER}).think is None
    assert item({"messages": USER}, think=True).think is True
    assert item({"messages": USER, "chat_template_kwargs": {"enable_thinking": False}}, think=True).think is False


def test_a_seed_depends_on_run_seed_and_id_alone() -> None:
    """The number is fixed: a change would make old outputs irreproducible."""
    assert derive_seed(0, "a") == 3426483283761622585
    assert derive_seed(0, "a") != derive_seed(1, "a")
    assert item({"prompt": "x", "id": "a"}).params.seed == derive_seed(0, "a")
    assert item({"prompt": "y", "id": "a"}, defaults=SamplingParams(seed=3)).params.seed == derive_seed(3, "a")
    assert 0 <= item({"prompt": "x", "seed": -1}).params.seed < 2**63


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        ({"prompt": "x"}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "64"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 8.5}, "max_tokens"),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens"),
        ({"top_k": 10**30}, "top_k"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_h": 2}, "top_h"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": 1}, "stop"),
        ({"model": 1}, "model"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"stream": True}, "stream"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": "yes"}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"logit_bias": {"²": 1}}, "logit_bias.²"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x"),
    ],
)
def test_a_bad_body_is_a_400_that_names_the_parameter(body: dict[str, Any], param: str) -> None:
    refused = bad(chat(**body))
    assert (refused.status, refused.custom_id, refused.param) == (400, "a", param)
    assert refused.message.startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("line", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": "a", "messages": USER}, "messages"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids[0]"),
        ({"prompt_token_ids": [1.5]}, "prompt_token_ids[0]"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt": "a", "id": ""}, "id"),
        ({"prompt": "a", "custom_id": [1]}, "custom_id"),
        ({"url": "/v1/chat/completions"}, "body"),
        ({"body": {}}, "url"),
        ({"url": "/v1/chat/completions", "body": 3}, "body"),
        ({"url": "/v1/chat/completions", "method": "GET", "body": {}}, "method"),
    ],
)
def test_a_bad_line_is_a_400_that_names_the_key(line: dict[str, Any], param: str) -> None:
    refused = bad(line)
    assert (refused.status, refused.custom_id, refused.param) == (400, "line-17", param)


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("max_tokens", 8.0, 8),
        ("max_completion_tokens", 8.0, 8),
        ("top_k", -1.0, 0),
        ("seed", 7.0, 7),
        ("top_logprobs", 2.0, 2),
    ],
)
def test_a_whole_number_may_be_written_as_a_float(key: str, value: float, kept: int) -> None:
    """Catches lines of pandas and JavaScript that are refused for 8.0, which JSON Schema calls an integer."""
    params = item(chat(**{key: value, "logprobs": True})).params
    name = {"max_completion_tokens": "max_tokens", "top_logprobs": "logprobs"}.get(key, key)
    assert getattr(params, name) == kept
    assert type(getattr(params, name)) is int


def test_whole_floats_do_in_ids_prompts_and_neutral_values_too() -> None:
    parsed = item({"id": 5.0, "prompt_token_ids": [1.0, 2], "n": 2.0, "min_tokens": 0.0, "best_of": 1.0}, strict=True)
    assert (parsed.custom_id, parsed.prompt_token_ids, parsed.choices) == ("5", (1, 2), 2)
    assert item({"url": "/v1/completions", "body": {"prompt": "a", "logprobs": 2.0}}).params.logprobs == 2


@pytest.mark.parametrize("seed", [2**63, 2**64 + 5, -(2**63) - 1, 10**30])
def test_a_seed_out_of_range_is_told_the_range(seed: int) -> None:
    """Catches "should be a valid integer" for an integer, which JSON readers turn into a float from 2^64 on."""
    refused = bad({"prompt": "x", "seed": seed})
    assert refused.param == "seed"
    assert "9223372036854775808" in refused.message


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_what_is_no_number_passes_in_keys_that_nobody_reads_and_is_named_in_others(value: str) -> None:
    """Catches a line of pandas' refused as no JSON, without its id, for a column that is not even read."""
    parsed = item(f'{{"id": "a", "prompt": "x NaN", "score": {value}}}')
    assert (parsed.custom_id, parsed.prompt) == ("a", "x NaN")
    assert [warning.message for warning in parsed.warnings] == ["unknown key 'score' ignored"]
    for key in ("temperature", "max_tokens", "top_p", "seed", "prompt"):
        refused = bad(f'{{"id": "a", "messages": [], "{key}": {value}}}')
        assert refused.custom_id == "a"
        assert any(message.startswith(f"{key}: ") for message in (refused.message, *refused.further))
    assert bad(f'{{"id": "a", "prompt": "x", "logit_bias": {{"1": {value}}}}}').param == "logit_bias.1"


@pytest.mark.parametrize(
    "url",
    [
        "/chat/completions",
        "/v1/chat/completions/",
        "chat/completions",
        "https://api.example.com/v1/chat/completions",
        "/openai/deployments/gpt/chat/completions?api-version=2024-10-21",
    ],
)
def test_an_address_may_have_a_host_a_deployment_or_no_version(url: str) -> None:
    """Catches batch files made for Azure, and those with whole addresses, that are refused line by line."""
    parsed = item(chat() | {"url": url, "method": "post"}, strict=True)
    assert (parsed.kind, parsed.warnings) == ("chat", ())
    text = {"url": url.replace("chat/", ""), "body": {"prompt": "x"}}
    assert item(text).kind == "completion"


@pytest.mark.parametrize("url", ["/v1/responses", "/v1/completions/x", "/v1/xcompletions", ""])
def test_another_address_is_named(url: str) -> None:
    assert bad(chat() | {"url": url}).code == "unknown_url"


def test_an_unknown_url_is_not_found() -> None:
    refused = bad({"custom_id": "a", "url": "/v1/embeddings", "body": {}})
    assert (refused.status, refused.param, refused.code) == (404, "url", "unknown_url")


def test_unknown_keys_and_foreign_models_warn_or_with_strict_are_refused() -> None:
    line = chat(model="gpt-4", colour="red") | {"extra": 1}
    codes = [(warning.code, warning.message) for warning in item(line, model_names=frozenset({"mini"})).warnings]
    assert codes == [
        ("unknown_key", "unknown key 'extra' ignored"),
        ("unknown_key", "unknown key 'colour' ignored"),
        ("foreign_model", "model 'gpt-4' is not the one that runs"),
    ]
    refused = bad(chat(model="gpt-4"), model_names=frozenset({"mini"}), strict=True)
    assert (refused.status, refused.param, refused.code) == (404, "model", "model_not_found")
    refused = bad(chat(colour="red"), strict=True)
    assert (refused.status, refused.param, refused.code) == (400, "colour", "unknown_parameter")
    assert item(chat(model="mini", metadata={"a": 1}), model_names=frozenset({"mini"}), strict=True).warnings == ()


@pytest.mark.parametrize("name", HARMLESS)
def test_a_parameter_that_is_not_honoured_passes_at_its_neutral_values_only(name: str) -> None:
    for value in HARMLESS[name]:
        assert item(chat(**{name: value}), strict=True).warnings == ()
    assert bad(chat(**{name: [["no"]]})).code == "unsupported_parameter"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"', "invalid JSON at column"),
        ('{"prompt": nan}', "invalid JSON at column 12"),
        ('{"prompt": NaN', "invalid JSON at column"),
        ('{"prompt": "\\ud800", "a": NaN}', "surrogate"),
        ('{"prompt": "a"} x', "invalid JSON at column"),
        ("[" * 100_000, "invalid JSON at column"),
        ('{"a":' * 2000 + "1" + "}" * 2000, "depth limit"),
        ("[1]", "a line is a JSON object, not an array"),
        ("null", "a line is a JSON object, not null"),
        ('{"id": "\\ud800"}', "surrogate"),
    ],
)
def test_a_line_that_is_no_json_object_has_no_status(text: str, message: str) -> None:
    refused = bad(text)
    assert (refused.status, refused.custom_id, refused.code) == (None, None, "invalid_line")
    assert message in refused.message


def test_the_second_line_with_an_id_is_bad_even_when_the_first_was() -> None:
    texts = [
        '{"id": "a"}',
        '{"id": "a", "prompt": "x"}',
        '{"prompt": "x"}',
        "{",
        "{",
        '{"id": "line-3", "prompt": "x"}',
    ]
    parsed = list(parse_lines((Line(number=n, text=text) for n, text in enumerate(texts, 1)), Rules()))
    codes = [(line.custom_id, line.code) if isinstance(line, BadLine) else line.custom_id for line in parsed]
    assert codes == [
        ("a", None),
        ("a", "duplicate_custom_id"),
        "line-3",
        (None, "invalid_line"),
        (None, "invalid_line"),
        ("line-3", "duplicate_custom_id"),
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = (
    "url",
    "body",
    "id",
    "custom_id",
    "method",
    "messages",
    "prompt",
    "prompt_token_ids",
    "stop",
    "model",
    "n",
    "seed",
)


@given(st.dictionaries(st.sampled_from(KEYS), JSON), st.sampled_from(["simple", "chat", "raw"]))
def test_no_json_raises(data: dict[str, Any], shape: str) -> None:
    line: Any = {"simple": data, "chat": {"url": "/v1/chat/completions", "body": data}, "raw": list(data.values())}[
        shape
    ]
    text = Line(number=1, text=orjson.dumps(line).decode())
    parsed = parse_line(text, Rules())
    assert isinstance(parsed, Item | BadLine)
    assert id_of(text, Rules()) == parsed.custom_id
