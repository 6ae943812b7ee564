"""Mistakes in what a schema becomes: answers without an end, blanks without an end, hints that nobody can follow."""

from __future__ import annotations

from typing import Any

import pytest

from trimkv_cli.errors import UsageError
from trimkv_cli.jobs.bodies import ResponseFormat
from trimkv_cli.jobs.formats import Form, make_form

NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/a"}}, "required": ["next"]}


def form(schema: Any) -> Form:
    made = make_form(ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"schema": schema}}))
    assert made is not None
    return made


def accepts(made: Form, text: str) -> bool:
    from llguidance import LLMatcher, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), made.grammar)
    return matcher.try_consume_tokens(list(text.encode())) == len(text.encode()) and matcher.is_accepting()


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}]},
        {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"$ref": "#/$defs/a", "$defs": {"a": NODE}},
        {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": {"a": NODE}},
        {"type": "array", "minItems": 1, "items": {"$ref": "#"}},
        {"type": "array", "minItems": 1, "prefixItems": [{"$ref": "#"}]},
        {"type": ["object"], "properties": {"a/b": {"$ref": "#/properties/a~1b"}}, "required": ["a/b"]},
        {"not": {}},
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"type": "string", "minLength": 5, "maxLength": 2},
        {"type": "integer", "minimum": 5, "maximum": 2},
        {"type": "array", "minItems": 5, "maxItems": 2},
        {"enum": []},
        {"anyOf": []},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "object", "properties": {}, "required": ["a"], "additionalProperties": False},
        {"$ref": "#/$defs/missing"},
    ],
)
def test_a_schema_that_nothing_satisfies_is_refused(schema: Any) -> None:
    """Catches an empty answer, or one that never ends, passed off as an answer that follows its schema."""
    with pytest.raises(UsageError, match=r"json_schema\.schema: "):
        form(schema)


@pytest.mark.parametrize(
    ("schema", "document"),
    [
        ({"type": "object", "properties": {"next": {"$ref": "#"}}}, '{"next":{"next":{}}}'),
        ({"type": "array", "items": {"$ref": "#"}}, "[[],[[]]]"),
        ({"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]}, "[null,[null]]"),
        (
            {
                "$ref": "#/$defs/a",
                "$defs": {"a": {**NODE, "properties": {"next": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}}},
            },
            '{"next":{"next":null}}',
        ),
        ({"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, '{"a":null}'),
    ],
)
def test_a_schema_that_names_itself_and_can_end_is_followed(schema: Any, document: str) -> None:
    """Catches trees and lists that are refused because they hold their like."""
    assert accepts(form(schema), document)


def test_an_answer_has_one_blank_where_it_may_have_any() -> None:
    """Catches small models that write newlines until max_tokens; the last blank is the one between two keys."""
    made = form({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "null"}}, "required": ["a"]})
    for good in ('{"a":1}', '{"a": 1, "b": null}', '{ "a": 1 }'):
        assert accepts(made, good)
    for bad in ('{\n"a": 1}', '{"a":  1}', '{"a": 1\n}', ' {"a": 1}', '{"a": 1} '):
        assert not accepts(made, bad)
    json_object = make_form(ResponseFormat(type="json_object"))
    assert json_object is not None
    assert not accepts(json_object, "{\n}")


def test_a_schema_may_ask_for_other_blanks() -> None:
    made = form({"type": "object", "properties": {"a": {}}, "x-guidance": {"whitespace_pattern": "[\\n]*"}})
    assert accepts(made, "{\n\n}")


def test_one_of_is_any_of_where_its_schemas_overlap_and_that_is_said() -> None:
    """Catches a hint at an option that no flag sets, and a warning where there is nothing to warn of."""
    overlapping = {"oneOf": [{"type": "object", "properties": {"a": {"type": "integer"}}}, {"type": "object"}]}
    made = form(overlapping)
    assert made.notes == ("oneOf is taken as anyOf: an answer may fit several of its schemas",)
    assert accepts(made, '{"a":1}')
    kinds = [{"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in ("x", "y")]
    assert accepts(form({"oneOf": kinds}), '{"kind":"y"}')


def test_the_worst_that_a_schema_may_look_like_is_an_error_of_ours() -> None:
    for schema in ({"$ref": 5}, {"type": 5}, {"required": [1], "properties": []}, {"$ref": "#/a/0/b", "a": []}):
        with pytest.raises(UsageError):
            form(schema)
