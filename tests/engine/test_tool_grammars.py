"""Forced calls: whatever a model would say, it is a call in its template's form that follows the function's schema."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from helpers import tiny_tokenizers as tiny
from trimkv_cli.engine.grammars import Grammars
from trimkv_cli.engine.text import Text
from trimkv_cli.jobs.tool_calls import CallParser, gather
from trimkv_cli.jobs.tool_formats import CallFormat
from trimkv_cli.jobs.tools import Tools

SCHEMA = {
    "type": "object",
    "properties": {"unit": {"$ref": "#/$defs/unit"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["unit", "days"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["C", "F"]}},
}
DEFINITIONS = (
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
)
FORMS = {
    "hermes": (tiny.hermes, ""),
    "llama": (tiny.llama32, ""),
    "mistral": (tiny.mistral, ""),
    "named": (tiny.mistral, "{# [ARGS] #}"),
    "harmony": (tiny.harmony, ""),
}


def tools(*names: str, parallel: bool = False) -> Tools:
    return Tools(definitions=DEFINITIONS, callable=names, forced=True, parallel=parallel)


def speak(text: Text, form: CallFormat, offered: Tools, seed: int) -> tuple[str, list[tuple[str, str]], list[str]]:
    """Choose tokens blindly among those that the grammar allows, and read what comes of them."""
    grammars = Grammars(text.tokenizer, text.end_ids)
    grammar = form.grammar(offered, text.added_id)
    grammars.check(grammar)
    matcher = grammars.matcher(grammar)
    shown = [token_id for marker in form.markers if (token_id := text.added_id(marker)) is not None]
    decoder = text.detokenizer(shown=shown)
    parser = CallParser(form, offered.callable, parallel=offered.parallel, call_id=str)
    draw, parts = random.Random(seed), []
    for _ in range(400):
        mask = matcher.compute_bitmask()
        token_id = draw.choice([i for i in range(len(text.tokenizer)) if mask[i // 8] >> i % 8 & 1])
        matcher.consume_token(token_id)
        if token_id in text.end_ids:
            break
        parts += parser.push(decoder.push(token_id))
    else:
        pytest.fail("the answer does not end")
    content, calls = gather([*parts, *parser.push(decoder.finish()), *parser.finish()])
    named = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    return content, named, [notice.message for notice in parser.notices]


@pytest.mark.parametrize(("make", "further"), FORMS.values(), ids=FORMS)
def test_a_forced_answer_is_a_call_that_follows_its_schema(
    make: Callable[[], PreTrainedTokenizerFast], further: str
) -> None:
    """Catches a grammar and a parser that differ, and markers that are special tokens and get lost on the way."""
    text = Text(make())
    form = CallFormat.of(text.template.text + further)
    assert form is not None
    seen = set()
    for seed in range(6):
        content, calls, notices = speak(text, form, tools("weather", "now"), seed)
        ((name, arguments),) = calls
        assert (content, notices) == ("", [])
        said = json.loads(arguments)
        assert said == {} if name == "now" else said["unit"] in "CF" and 1 <= said["days"] <= 9
        seen.add(name)
    assert seen == {"weather", "now"}
    assert {speak(text, form, tools("now"), seed)[1][0][0] for seed in range(3)} == {"now"}


@pytest.mark.parametrize("name", ["hermes", "mistral", "named"])
def test_several_calls_may_be_forced_where_a_form_has_them(name: str) -> None:
    make, further = FORMS[name]
    text = Text(make())
    form = CallFormat.of(text.template.text + further)
    assert form is not None
    counts = {len(speak(text, form, tools("now", parallel=True), seed)[1]) for seed in range(8)}
    assert max(counts) > 1


def test_a_marker_is_text_only_where_it_is_asked_for() -> None:
    """Catches markers that appear in answers without tools."""
    text = Text(tiny.mistral())
    token_id = text.added_id("[TOOL_CALLS]")
    assert token_id is not None
    ids = [*text.encode("Hm"), token_id, *text.encode("é"), token_id]
    for shown, said in ((), "Hmé"), ((token_id,), "Hm[TOOL_CALLS]é[TOOL_CALLS]"):
        decoder = text.detokenizer(shown=shown)
        assert "".join(map(decoder.push, ids)) + decoder.finish() == said
    decoder = text.detokenizer(["CALLS]é"], shown=[token_id])
    assert "".join(map(decoder.push, ids)) + decoder.finish() == "Hm[TOOL_"
