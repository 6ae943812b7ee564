"""Questions as messages or as texts to continue, what counts as right, and the file that holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trimkv_cli.errors import InputError
from trimkv_cli.files import as_text

_ROLES = ("system", "user", "assistant")
_EXAMPLE = 'a line is {"messages": [...], "answer": "..."}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What is asked, as messages or as a text to continue, and the one answer that counts as right.

    `value` is the part of a generated answer that `--match contains` looks for; "" = all of it; `also` are other ways
    to write it. Questions of one `document` ("" = its own) share the first `head` characters of the prompt, or of the
    last message. `id` is empty until the question is part of an exam, or where a file gives none.
    """

    answer: str
    value: str = ""
    also: tuple[str, ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()
    prompt: str | None = None
    document: str = ""
    head: int = 0
    id: str = ""

    @property
    def last(self) -> str:
        """The text that ends with the question."""
        return self.messages[-1]["content"] if self.prompt is None else self.prompt

    def ending(self, question: str) -> Sample:
        """Return the same with another text after the first `head` characters."""
        text = self.last[: self.head] + question
        if self.prompt is not None:
            return replace(self, prompt=text)
        return replace(self, messages=(*self.messages[:-1], {**self.messages[-1], "content": text}))


def read_samples(path: str, *, limit: int | None = None) -> list[Sample]:
    """Read JSON lines with `answer` and either `messages` or `prompt`; blank lines are passed over.

    Raises:
        InputError: a file that cannot be read or holds no line, or a bad line, by its number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}", hint=f"iconv -t UTF-8 {path}") from error
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    samples = [_read_line(line, f"{path}:{number}") for number, line in filled[:limit]]
    if not samples:
        raise InputError(f"{path} holds no questions", hint=_EXAMPLE)
    return samples


def _read_line(line: str, where: str) -> Sample:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise _bad(where, f"invalid JSON: {error}") from None
    if not isinstance(data, dict):
        raise _bad(where, "not a JSON object")
    answer, messages, prompt = data.get("answer"), data.get("messages"), data.get("prompt")
    if not isinstance(answer, str) or not answer.strip():
        raise _bad(where, "answer must be a text that is not empty")
    if (messages is None) == (prompt is None):
        raise _bad(where, "give either messages or prompt")
    more = _read_more(data, where)
    if prompt is None:
        return Sample(answer=as_text(answer, where), messages=_read_messages(messages, where), **more)
    if not isinstance(prompt, str) or not prompt:
        raise _bad(where, "prompt must be a text that is not empty")
    return Sample(answer=as_text(answer, where), prompt=as_text(prompt, where), **more)


def _read_more(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read what an exported line says beside question and answer; of a user's own ids any may be a number."""
    more: dict[str, Any] = {"id": as_text(str(data.get("id", "")), where)}
    for name in ("value", "document"):
        if not isinstance(data.get(name, ""), str):
            raise _bad(where, f"{name} must be a text")
        more[name] = as_text(data.get(name, ""), where)
    also, head = data.get("also", []), data.get("head", 0)
    if not isinstance(also, list) or not all(isinstance(one, str) and one.strip() for one in also):
        raise _bad(where, "also must be a list of texts")
    if not isinstance(head, int) or isinstance(head, bool) or head < 0:
        raise _bad(where, "head must be a number of characters")
    return {**more, "also": tuple(also), "head": head}


def _read_messages(messages: Any, where: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise _bad(where, "messages must be a list that is not empty")
    for number, message in enumerate(messages):
        plain = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not plain or message.get("role") not in _ROLES:
            raise _bad(where, f"messages[{number}] needs a role ({', '.join(_ROLES)}) and a text as content")
    if messages[-1]["role"] != "user":
        raise _bad(where, "the last message must be the user's")
    return tuple({"role": message["role"], "content": as_text(message["content"], where)} for message in messages)


def _bad(where: str, what: str) -> InputError:
    return InputError(f"{where}: {what}", hint=_EXAMPLE)
