"""Calls of tools in an answer, read from its text piece by piece."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import orjson

from trimkv_cli.events import Notice
from trimkv_cli.jobs.bodies import ToolCall
from trimkv_cli.jobs.lines import Item
from trimkv_cli.jobs.tool_formats import CallFormat
from trimkv_cli.jobs.tool_readers import READERS
from trimkv_cli.jobs.tool_text import AnswerText, CallArguments, CallBegun, CallEnded, Part, Said, Steps

__all__ = [
    "CallArguments",
    "CallBegun",
    "CallEnded",
    "CallParser",
    "Part",
    "Said",
    "answer_message",
    "delta",
    "gather",
]


class CallParser:
    """Read an answer's text as it comes: what is said, and what is called.

    >>> parser = CallParser.of(item, text.template)  # None: all of the answer is text
    >>> for piece in pieces:
    ...     for part in parser.push(piece): send(delta(part))
    >>> for part in parser.finish(): send(delta(part))

    However the text is cut, the parts say the same together. Only what may begin a call is held back, until it is one
    (its function's name is read, and the arguments begin) or cannot be; then it is text as it stands. A call that has
    begun stays one: when its arguments are cut or no JSON, `notices` says so. Blanks around calls are dropped.
    `calls` counts those that have begun.
    """

    def __init__(
        self, form: CallFormat, names: tuple[str, ...], *, parallel: bool = True, call_id: Callable[[int], str]
    ) -> None:
        self._answer = AnswerText(names, None if parallel else 1, call_id)
        self._steps: Steps[None] | None = READERS[form.family](self._answer)
        next(self._steps)

    @classmethod
    def of(cls, item: Item, template: str, *, choice: int = 0) -> CallParser | None:
        """Start reading one choice of an item's answers; None where no call can come of it."""
        form = CallFormat.of(template)
        tools = item.tools
        if form is None or tools is None or not tools.callable:
            return None
        # The conversation counts too, or a later turn with the same seed would name its calls as an earlier one did.
        asked = hashlib.sha256(orjson.dumps([item.params.seed, item.messages, choice])).hexdigest()

        def call_id(index: int) -> str:
            return "call_" + hashlib.sha256(f"{asked}/{index}".encode()).hexdigest()[:24]

        return cls(form, tools.callable, parallel=tools.parallel, call_id=call_id)

    @property
    def calls(self) -> int:
        return self._answer.calls

    @property
    def notices(self) -> tuple[Notice, ...]:
        """What the reader of the answer should know of its calls, so far."""
        return tuple(self._answer.notices)

    def push(self, piece: str) -> list[Part]:
        """Take the next piece of text and return what is certain now, maybe nothing."""
        for character in piece:
            self._send(character)
        return self._answer.take()

    def finish(self) -> list[Part]:
        """Return what was held back; nothing follows."""
        while self._steps is not None:
            self._send("")
        self._answer.close()
        return self._answer.take()

    def _send(self, character: str) -> None:
        if self._steps is not None:
            try:
                self._steps.send(character)
            except StopIteration:
                self._steps = None


def delta(part: Part) -> dict[str, Any] | None:
    """Return what OpenAI's streams carry for a part as `choices[].delta`; None where they carry nothing."""
    if isinstance(part, Said):
        return {"content": part.text}
    if isinstance(part, CallBegun):
        function = {"name": part.name, "arguments": ""}
        return {"tool_calls": [{"index": part.index, "id": part.id, "type": "function", "function": function}]}
    if isinstance(part, CallArguments):
        return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}
    return None


def gather(parts: list[Part]) -> tuple[str, list[dict[str, Any]]]:
    """Return the content of a whole answer, and its calls as `message.tool_calls` has them."""
    content, calls = "", list[dict[str, Any]]()
    for part in parts:
        if isinstance(part, Said):
            content += part.text
        elif isinstance(part, CallBegun):
            calls.append({"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}})
        elif isinstance(part, CallArguments):
            calls[part.index]["function"]["arguments"] += part.text
    return content, calls


def answer_message(item: Item, template: str, text: str) -> dict[str, Any]:
    """Return an answer as the message that a client sends back of it, in the form in which templates are given it."""
    parser = CallParser.of(item, template)
    if parser is None:
        return {"role": "assistant", "content": text}
    content, calls = gather([*parser.push(text), *parser.finish()])
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [ToolCall.model_validate(call).plain() for call in calls]
    return message
