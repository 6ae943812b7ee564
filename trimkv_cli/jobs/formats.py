"""Turns what a request asks of its answer's form into a grammar."""

from __future__ import annotations

from typing import Any

from trimkv_cli.errors import UsageError
from trimkv_cli.jobs.bodies import ResponseFormat

# Room for indented JSON, but not for a model that never leaves the blanks.
_BLANKS: Any = {"whitespace_pattern": r"[ \n\r\t]{0,20}"}


def make_grammar(response_format: ResponseFormat | None) -> str | None:
    """Return the grammar of a format, in llguidance's form; None for plain text.

    Raises:
        UsageError: a schema that is missing, broken or uses keywords that cannot be enforced.
    """
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return _compile({"type": "object"})
    if response_format.json_schema is None:
        raise UsageError("json_schema: field required")
    return _compile(response_format.json_schema.schema_)


def _compile(schema: dict[str, Any]) -> str:
    from llguidance import LLMatcher

    try:
        grammar: str = LLMatcher.grammar_from_json_schema(schema, defaults=_BLANKS)
    except ValueError as error:
        raise UsageError(f"json_schema.schema: {error}") from error
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        raise UsageError(f"json_schema.schema: {messages[0].strip()}")
    return grammar
