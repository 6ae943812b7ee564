"""Grammars for what a request asks of its answer's form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from trimkv_cli.errors import UsageError
from trimkv_cli.jobs.bodies import ResponseFormat

# One blank where JSON allows any: small models never leave them, and indentation says nothing.
_BLANKS: Any = {"whitespace_pattern": "[ ]?"}
_ANY_OF: Any = {**_BLANKS, "coerce_one_of": True}  # llguidance's name of it
_ONE_OF = "oneOf is taken as anyOf: an answer may fit several of its schemas"


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A grammar in llguidance's form, and what in the schema it does not enforce."""

    grammar: str
    notes: tuple[str, ...] = ()


def make_form(response_format: ResponseFormat | None) -> Form | None:
    """Return the form that a format asks for; None for plain text.

    Raises:
        UsageError: a schema that is missing, broken, satisfied by nothing or uses keywords that cannot be enforced.
    """
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return schema_form({"type": "object"})
    if response_format.json_schema is None:
        raise UsageError("json_schema: field required")
    try:
        return schema_form(response_format.json_schema.schema_)
    except UsageError as error:
        raise UsageError(f"json_schema.schema: {error}") from error


def schema_form(schema: dict[str, Any]) -> Form:
    """Return the form of a document that a schema describes.

    Raises:
        UsageError: a schema that is broken, satisfied by nothing or uses keywords that cannot be enforced.
    """
    endless = _References(schema).endless()
    if endless is not None:
        raise UsageError(f"nothing satisfies it: {endless!r} needs itself without an end")
    try:
        return _form(schema, _BLANKS)
    except UsageError as error:
        if "coerce_one_of" not in error.message:
            raise
        return _form(schema, _ANY_OF)


def _form(schema: dict[str, Any], options: Any) -> Form:
    from llguidance import LLMatcher

    try:
        grammar: str = LLMatcher.grammar_from_json_schema(schema, defaults=options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        raise UsageError(messages[0].strip())
    return Form(grammar=grammar, notes=tuple(_ONE_OF if "oneOf" in message else message for message in messages))


@dataclass(slots=True)
class _References:
    """The `$ref`s of a schema: which of them some finite document can satisfy."""

    root: dict[str, Any]
    ending: set[str] = field(default_factory=set)

    def endless(self) -> str | None:
        """Return a reference that nothing finite satisfies; all are taken for such until they are shown to end."""
        found = {ref: _target(self.root, ref) for ref in _references(self.root)}
        left = {ref for ref, target in found.items() if target is not None}
        while ended := {ref for ref in left if self._ends(found[ref])}:
            self.ending |= ended
            left -= ended
        return min(left, default=None)

    def _ends(self, schema: Any) -> bool:
        """Say whether a document that satisfies `schema` has an end, by the references that are known to end."""
        if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
            return True
        ref = schema.get("$ref")
        if isinstance(ref, str) and _target(self.root, ref) is not None and ref not in self.ending:
            return False
        for key, enough in (("allOf", all), ("anyOf", any), ("oneOf", any)):
            parts = schema.get(key)
            if isinstance(parts, list) and parts and not enough(self._ends(part) for part in parts):
                return False
        return self._one_type_ends(schema)

    def _one_type_ends(self, schema: dict[str, Any]) -> bool:
        types = schema.get("type", "any")
        for name in types if isinstance(types, list) else [types]:
            needed = {"object": _required, "array": _first_items}.get(name, _nothing)(schema)
            if all(self._ends(part) for part in needed):
                return True
        return not types


def _required(schema: dict[str, Any]) -> list[Any]:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return []
    return [properties[name] for name in required if isinstance(name, str) and name in properties]


def _first_items(schema: dict[str, Any]) -> list[Any]:
    least, first, items = schema.get("minItems"), schema.get("prefixItems"), schema.get("items")
    if not isinstance(least, int | float) or least < 1:
        return []
    first = first[: int(least)] if isinstance(first, list) else []
    return [*first, items] if len(first) < least else first


def _nothing(_: dict[str, Any]) -> list[Any]:
    return []


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(ref := schema.get("$ref"), str):
            yield ref
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _target(root: dict[str, Any], ref: str) -> Any:
    """Return what a reference within the schema points to; None for any other, which llguidance judges."""
    if not ref.startswith("#"):
        return None
    place: Any = root
    for step in unquote(ref[1:]).split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(place, dict):
            place = place.get(key)
        elif isinstance(place, list) and key.isdigit() and int(key) < len(place):
            place = place[int(key)]
        else:
            return None
    return place
