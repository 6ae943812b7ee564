"""One question with its expected answer, and the reader of a user's own questions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimkv_cli.errors import InputError
from trimkv_cli.utf8 import as_text

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is asked, as messages or as a text to continue, and the one answer that counts as right.

    `value` is the part of a generated answer that `--match contains` looks for; "" = all of it.
    """

    answer: str
    value: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    prompt: str | None = None


def read_cases(path: str, *, limit: int | None = None) -> list[Case]:
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
    cases = [_read_line(line, f"{path}:{number}") for number, line in filled[:limit]]
    if not cases:
        raise InputError(f"{path} holds no questions", hint='a line is {"messages": [...], "answer": "..."}')
    return cases


def _read_line(line: str, where: str) -> Case:
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
    if prompt is None:
        return Case(answer=as_text(answer, where), messages=_read_messages(messages, where))
    if not isinstance(prompt, str) or not prompt:
        raise _bad(where, "prompt must be a text that is not empty")
    return Case(answer=as_text(answer, where), prompt=as_text(prompt, where))


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
    return InputError(f"{where}: {what}", hint='a line is {"messages": [...], "answer": "..."}')
