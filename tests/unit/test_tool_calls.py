"""Calls of tools in answers: whatever form and however cut, what is called is told from what is said."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from helpers import tiny_tokenizers as tiny
from trimkv_cli.jobs.lines import Item
from trimkv_cli.jobs.tool_calls import CallParser, delta, gather
from trimkv_cli.jobs.tool_formats import CallFormat
from trimkv_cli.jobs.tools import Tools
from trimkv_cli.request import SamplingParams

TEMPLATES = {
    "hermes": tiny.HERMES,
    "llama": tiny.LLAMA32,
    "mistral": tiny.MISTRAL,
    "named": tiny.MISTRAL + "[ARGS]",
    "harmony": tiny.HARMONY,
}
COMMENTARY = "<|start|>assistant<|channel|>commentary"
BERN = '{"town": "Bern"}'


def item(*, seed: int = 1, parallel: bool = True, callable_: tuple[str, ...] = ("f", "g"), content: str = "a") -> Item:
    definitions = tuple({"type": "function", "function": {"name": name}} for name in ("f", "g"))
    tools = Tools(definitions=definitions, callable=callable_, parallel=parallel)
    messages = ({"role": "user", "content": content},)
    return Item(line=1, custom_id="a", kind="chat", params=SamplingParams(seed=seed), messages=messages, tools=tools)


def read(form: str, *pieces: str, **said: Any) -> tuple[str, list[tuple[str, str]], list[str]]:
    """Return what is said, what is called, and the codes of notices."""
    parser = CallParser.of(item(**said), TEMPLATES[form])
    assert parser is not None
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    content, calls = gather(parts)
    assert parser.calls == len(calls)
    called = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    return content, called, [notice.code for notice in parser.notices]


F, G = ("f", BERN), ("g", "{}")
ANSWERS: dict[str, list[tuple[str, str, list[tuple[str, str]]]]] = {
    "hermes": [
        (f'<tool_call>\n{{"name": "f", "arguments": {BERN}}}\n</tool_call>', "", [F]),
        (f'Let me see.\n<tool_call>{{"name":"f","arguments":{BERN}}}</tool_call>\n', "Let me see.", [F]),
        (
            f'<tool_call>{{"name": "f", "arguments": {BERN}}}</tool_call>\n<tool_call>{{"name": "g"}}</tool_call>',
            "",
            [F, G],
        ),
        (f'<tool_call>{{"arguments": {BERN}, "name": "f"}}</tool_call>', "", [F]),
        (f'<tool_call>{{"id": "x", "name": "f", "arguments": {json.dumps(BERN)}}}</tool_call>', "", [F]),
        ('<tool_call>{"name": "g"}</tool_call> Done.', " Done.", [G]),
        ('<tool_call>{"name": "g", "arguments": null}</tool_call>', "", [G]),
        (
            '<think>\nI may <tool_call>{"name": "g"}</tool_call>.\n</think>\n\nNo.',
            '<think>\nI may <tool_call>{"name": "g"}</tool_call>.\n</think>\n\nNo.',
            [],
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>{\\""}}</tool_call>',
            "",
            [("f", '{"a": "</tool_call>{\\""}')],
        ),
    ],
    "llama": [
        (f'{{"name": "f", "parameters": {BERN}}}', "", [F]),
        (f'<|python_tag|>{{"name": "f", "parameters": {BERN}}}', "", [F]),
        (
            f'\n{{"type": "function", "name": "f", "parameters": {BERN}}}; {{"name": "g", "parameters": {{}}}}',
            "",
            [F, G],
        ),
        (f'Hm.\n<|python_tag|>{{"name": "f", "parameters": {BERN}}}', "Hm.", [F]),
        ('{"title": "Dune"}', '{"title": "Dune"}', []),
        (f'Say {{"name": "f", "parameters": {BERN}}}', f'Say {{"name": "f", "parameters": {BERN}}}', []),
    ],
    "mistral": [
        (f'[TOOL_CALLS] [{{"name": "f", "arguments": {BERN}}}, {{"name": "g", "arguments": {{}}}}]', "", [F, G]),
        (f'[TOOL_CALLS][{{"name": "f", "arguments": {BERN}, "id": "abcdefgh1"}}]', "", [F]),
        (f'[TOOL_CALLS]{{"name": "f", "arguments": {BERN}}}', "", [F]),
    ],
    "named": [
        (f"[TOOL_CALLS]f[ARGS]{BERN}[TOOL_CALLS]g[ARGS]{{}}", "", [F, G]),
        (f"Well [TOOL_CALLS]f[CALL_ID]abcdefgh1[ARGS]{BERN}", "Well", [F]),
        (f"[TOOL_CALLS]f{BERN}", "", [F]),
    ],
    "harmony": [
        (f"<|channel|>commentary to=functions.f <|constrain|>json<|message|>{BERN}<|call|>", "", [F]),
        (f" to=functions.f<|channel|>commentary json<|message|>{BERN}", "", [F]),
        (
            f"<|channel|>analysis<|message|>Hm, f.<|end|>{COMMENTARY} to=functions.f json<|message|>{BERN}<|call|>",
            "Hm, f.",
            [F],
        ),
        (
            "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>",
            "Easy.\n\nFour.",
            [],
        ),
        (" Four", " Four", []),
    ],
}
CASES = [(form, *case) for form, cases in ANSWERS.items() for case in cases]
every_answer = pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)


@pytest.mark.parametrize(("form", "template"), TEMPLATES.items())
def test_a_form_is_told_by_the_template(form: str, template: str) -> None:
    found = CallFormat.of(template)
    assert found is not None
    assert (found.family, found.named) == ("mistral" if form == "named" else form, form == "named")


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.LLAMA3, "", "<tool_call><function=f> arguments"])
def test_a_template_of_no_known_form_has_none(template: str) -> None:
    assert CallFormat.of(template) is None
    assert CallParser.of(item(), template) is None


@every_answer
def test_calls_are_told_from_text_wherever_the_text_is_cut(
    form: str, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    """Catches a marker, a name or an escape that is missed when it comes in two pieces."""
    assert read(form, text) == (content, calls, [])
    assert read(form, *text) == (content, calls, [])
    for cut in range(1, len(text)):
        assert read(form, text[:cut], text[cut:]) == (content, calls, [])


# Pieces of every form, and what tends to stand between them.
PIECES = (
    *(f'{{"name": "{name}", "{key}": {{}}' for name in ("f", "h") for key in ("arguments", "parameters")),
    *("<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]x", "<|python_tag|>", "<think>"),
    *("<|channel|>final", "<|channel|>commentary to=functions.f", "<|message|>", "<|end|>", "<|start|>assistant"),
    *(" ", "\n", "{", "}", "[", "]", '"', "\\", ",", ":", ";", "f", "name", "</think>", "é", BERN, '{"name": "f"}'),
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), st.lists(st.sampled_from(PIECES), max_size=12), st.data())
def test_any_pieces_say_the_same_as_the_whole(form: str, pieces: list[str], data: st.DataObject) -> None:
    """Catches text that is lost or doubled, and a parser that ends with an error of its own."""
    text = "".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    whole = read(form, text)
    assert read(form, *(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))) == whole
    content, calls, _ = whole
    if not calls and form != "harmony":
        assert content == text


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", '<tool_call>{"name": "h", "arguments": {}}</tool_call>'),
        ("hermes", "<tool_call>f(1)</tool_call>"),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arg'),
        ("llama", '{"name": "h", "parameters": {}}'),
        ("llama", '<|python_tag|>search.call(query="a")'),
        ("mistral", "[TOOL_CALLS] []"),
        ("named", "[TOOL_CALLS]h[ARGS]{}"),
        ("harmony", "<|channel|>commentary to=functions.h<|message|>{}"),
    ],
)
def test_what_is_no_call_stays_text_with_a_warning(form: str, text: str) -> None:
    """Catches a call of no function, or a broken one, that is handed out or lost."""
    assert read(form, text) == (text, [], ["tool_call_as_text"])
    assert read(form, *text) == (text, [], ["tool_call_as_text"])


@pytest.mark.parametrize("arguments", ['{"town": "Be', '{"town": Bern}', '{"town"; 1}'])
def test_a_call_whose_arguments_are_cut_or_broken_says_so(arguments: str) -> None:
    content, calls, codes = read("hermes", f'<tool_call>{{"name": "f", "arguments": {arguments}')
    (call,) = calls
    assert arguments == call[1] + content
    assert codes == ["tool_call_incomplete"]


def test_one_call_is_read_where_one_was_asked_for() -> None:
    call = f'<tool_call>{{"name": "f", "arguments": {BERN}}}</tool_call>'
    assert read("hermes", call + call, parallel=False) == (call, [F], ["tool_call_as_text"])


def test_without_a_choice_of_calls_there_is_no_parser() -> None:
    assert CallParser.of(item(callable_=()), tiny.HERMES) is None


def test_text_streams_and_arguments_do_too() -> None:
    """Catches a parser that holds an answer back until its end."""
    parser = CallParser.of(item(), tiny.HERMES)
    assert parser is not None
    text = f'Let me see.\n<tool_call>\n{{"name": "f", "arguments": {BERN}}}\n</tool_call>'
    sent = [[delta(part) for part in parser.push(character)] for character in text]
    said, said_at = "", 0
    for place, deltas in enumerate(sent):
        for each in deltas:
            if each is not None and "content" in each:
                said, said_at = said + each["content"], place
    assert (said, said_at) == ("Let me see.", text.index("\n") - 1)
    begun = next(place for place, deltas in enumerate(sent) if deltas and "tool_calls" in (deltas[0] or {}))
    assert begun == text.index(BERN)
    assert sent[text.index("Bern")] == [{"tool_calls": [{"index": 0, "function": {"arguments": "B"}}]}]
    assert parser.finish() == []


def test_ids_are_a_function_of_seed_conversation_choice_and_place() -> None:
    """Catches ids that differ from run to run, and two turns of a conversation that name their calls alike."""

    def ids(found: Item, choice: int = 0) -> list[str]:
        parser = CallParser.of(found, tiny.HERMES, choice=choice)
        assert parser is not None
        call = f'<tool_call>{{"name": "f", "arguments": {BERN}}}</tool_call>'
        return [call["id"] for call in gather(parser.push(call + call))[1]]

    assert ids(item()) == ids(item())
    every = [*ids(item()), *ids(item(seed=2)), *ids(item(content="b")), *ids(item(), 1)]
    assert len({*every}) == 8
    assert all(each.startswith("call_") for each in every)
