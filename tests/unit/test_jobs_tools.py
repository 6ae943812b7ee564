"""Request bodies with tools: what is taken as OpenAI's clients send it, what is refused, and by which name."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.fake_engine import run
from trimkv_cli.jobs.lines import BadLine, Item, Rules, parse_line
from trimkv_cli.jobs.reading import Line

WEATHER = {
    "name": "get_weather",
    "description": "The weather in a town.",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now"}}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"town": "Bern"}'}}
ASKED = {"role": "user", "content": "How is the weather in Bern?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}


def parsed(**body: Any) -> Item | BadLine:
    import json

    line = {"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [ASKED], **body}}
    return parse_line(Line(number=1, text=json.dumps(line)), Rules(strict=True))


def item(**body: Any) -> Item:
    found = parsed(**body)
    assert isinstance(found, Item), found
    return found


def bad(**body: Any) -> BadLine:
    found = parsed(**body)
    assert isinstance(found, BadLine), found
    return found


def test_tools_go_to_the_template_as_they_are_said() -> None:
    tools = item(tools=[{"type": "function", "function": {**WEATHER, "strict": False}}, TOOLS[1]]).tools
    assert tools is not None
    assert tools.definitions == tuple(TOOLS)
    assert (tools.callable, tools.forced, tools.parallel) == (("get_weather", "now"), False, True)


@pytest.mark.parametrize(
    ("said", "callable_", "forced", "parallel"),
    [
        ({"tool_choice": "none"}, (), False, True),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ("get_weather", "now"), False, False),
        ({"tool_choice": "required", "parallel_tool_calls": True}, ("get_weather", "now"), True, True),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, ("now",), True, False),
    ],
)
def test_a_choice_says_what_may_be_called(
    said: dict[str, Any], callable_: tuple[str, ...], forced: bool, parallel: bool
) -> None:
    tools = item(tools=TOOLS, **said).tools
    assert tools is not None
    assert (tools.callable, tools.forced, tools.parallel) == (callable_, forced, parallel)


def test_calls_and_results_of_earlier_answers_are_messages() -> None:
    """Catches arguments that a template would quote once more, as they come as the text of an object."""
    found = item(messages=[ASKED, CALLED, RESULT]).messages
    function = {"name": "get_weather", "arguments": {"town": "Bern"}}
    assert found == (
        ASKED,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        RESULT,
    )


@pytest.mark.parametrize("arguments", ["", "{", "[1]", "Bern"])
def test_arguments_that_are_no_object_stay_text(arguments: str) -> None:
    call = {**CALL, "function": {"name": "now", "arguments": arguments}}
    messages = item(messages=[ASKED, {**CALLED, "tool_calls": [call]}]).messages
    assert messages is not None
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == arguments


def test_strict_arguments_are_noted_where_nothing_holds_the_model_to_them() -> None:
    strict = [{"type": "function", "function": {**WEATHER, "strict": True}}]
    assert [notice.code for notice in item(tools=strict).warnings] == ["tools"]
    assert item(tools=strict, tool_choice="required").warnings == ()


def function(**said: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": said}]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": "f"}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (function(description="x"), "tools[0].function.name"),
        (function(name=""), "tools[0].function.name"),
        (function(name="a b"), "tools[0].function.name"),
        (function(name="f", parameters=[]), "tools[0].function.parameters"),
        (function(name="f", parameters={"type": "string"}), "tools[0].function.parameters"),
        (function(name="f", parameters={"properties": {"a": {"type": "no"}}}), "tools[0].function.parameters"),
        (function(name="f", colour="red"), "colour"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools[1].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "later"}}},
            "tool_choice.function.name",
        ),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [ASKED, CALLED, {"role": "tool", "content": "x"}]}, "messages[2].tool_call_id"),
        ({"messages": [ASKED, CALLED, {**RESULT, "tool_call_id": "call_2"}]}, "messages[2].tool_call_id"),
        ({"messages": [{**ASKED, "tool_call_id": "call_1"}]}, "messages[0].tool_call_id"),
        ({"messages": [{**ASKED, "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [ASKED, {"role": "assistant", "content": None}]}, "messages[1].content"),
        (
            {"messages": [ASKED, {**CALLED, "tool_calls": [{**CALL, "function": {"name": "f"}}]}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
)
def test_bad_tools_are_a_400_that_names_the_parameter(body: dict[str, Any], param: str) -> None:
    refused = bad(**body)
    assert (refused.status, refused.param) == (400, param), refused.message
    assert refused.message.startswith(f"{param}: ")


def test_tools_need_messages() -> None:
    [record], _ = run([{"url": "/v1/completions", "body": {"prompt": "a", "tools": TOOLS}}])
    assert record["response"]["body"]["error"]["param"] == "tools"


def test_a_keyword_that_cannot_be_enforced_matters_only_where_a_call_is_forced() -> None:
    """Catches tools refused for a schema that only tells the model something."""
    tools = function(name="f", parameters={"type": "object", "properties": {"a": {"not": {"type": "string"}}}})
    assert item(**tools).tools is not None
    assert bad(**tools, tool_choice="required").param == "tools[0].function.parameters"
