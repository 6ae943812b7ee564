"""The forms in which models write calls of tools: told by the chat template, and forced by a grammar."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from trimkv_cli.jobs.tools import Tools

Family: TypeAlias = Literal["hermes", "llama", "mistral", "harmony"]
AddedId: TypeAlias = Callable[[str], int | None]  # of an added token; None for other text

OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON = "<|python_tag|>"
TOOL_CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """One form of calls; `markers` are special tokens in some tokenizers, and text of an answer where it has tools."""

    family: Family
    markers: tuple[str, ...]
    named: bool = False  # Mistral's newer form: the name stands before the arguments, outside of the JSON

    @classmethod
    def of(cls, template: str) -> CallFormat | None:
        """Tell a form by a chat template's text; None for one that is not read here."""
        if CHANNEL in template and "functions." in template:
            return cls(family="harmony", markers=(START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS))
        if TOOL_CALLS in template:
            return cls(family="mistral", markers=(TOOL_CALLS, ARGS, CALL_ID), named=ARGS in template)
        if OPEN in template and "arguments" in template and "<function=" not in template and "<arg_" not in template:
            return cls(family="hermes", markers=(OPEN, CLOSE))
        if "parameters" in template and (PYTHON in template or "ipython" in template):
            return cls(family="llama", markers=(PYTHON,))
        return None

    def grammar(self, tools: Tools, added_id: AddedId) -> str:
        """Return a grammar, in llguidance's form, of calls whose arguments follow their functions' schemas."""
        calls = [self._call(name, f"args_{place}", added_id) for place, name in enumerate(tools.callable)]
        schemas = (json.dumps(_guided(tools.schema(name))) for name in tools.callable)
        lines = [f"start: {self._calls(tools.parallel, added_id)}", f"call: {' | '.join(calls)}"]
        return "\n".join([*lines, *(f"args_{place}: %json {schema}" for place, schema in enumerate(schemas)), ""])

    def _calls(self, parallel: bool, added_id: AddedId) -> str:
        if self.family == "mistral" and not self.named:
            further = ' (", " call)*' if parallel else ""
            return f'{_token(TOOL_CALLS, added_id)} " [" call{further} "]"'
        if self.family == "hermes" and parallel:
            return r'call ("\n" call)*'
        return "call+" if self.family == "mistral" and parallel else "call"

    def _call(self, name: str, arguments: str, added_id: AddedId) -> str:
        def token(text: str) -> str:
            return _token(text, added_id)

        key = "parameters" if self.family == "llama" else "arguments"
        head = _text(f'{{"name": "{name}", "{key}": ')
        body = f'{head} {arguments} "}}"'
        if self.family == "hermes":
            return rf'{token(OPEN)} "\n" {body} "\n" {token(CLOSE)}'
        if self.family == "harmony":
            header = _text(f"commentary to=functions.{name} ")
            return f'{token(CHANNEL)} {header} {token(CONSTRAIN)} "json" {token(MESSAGE)} {arguments}'
        return f"{token(TOOL_CALLS)} {_text(name)} {token(ARGS)} {arguments}" if self.named else body


def _guided(schema: dict[str, Any]) -> dict[str, Any]:
    """Write at most one blank where JSON allows any, and take oneOf as anyOf, as answers' formats do."""
    return {"type": "object", **schema, "x-guidance": {"whitespace_pattern": "[ ]?", "coerce_one_of": True}}


# Grammars know added tokens by their ids alone, not by their texts.
def _token(text: str, added_id: AddedId) -> str:
    token_id = added_id(text)
    return _text(text) if token_id is None else f"<[{token_id}]>"


def _text(text: str) -> str:
    return json.dumps(text)
