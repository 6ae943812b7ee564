"""The text of an answer character by character, the parts that are made of it, and JSON in it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import orjson

from trimkv_cli.events import Notice


@dataclass(frozen=True, slots=True)
class Said:
    """Text of the answer that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call, by its place among the answer's calls; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next piece of the text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The end of a call's arguments."""

    index: int


Part: TypeAlias = Said | CallBegun | CallArguments | CallEnded

T = TypeVar("T")
Steps: TypeAlias = Generator[None, str, T]  # each yield asks for the next character; "" is the end of the answer

LONGEST = 1024  # of a key or a name, and of a header
_CLOSERS = {"{": "}", "[": "]"}
_OUTSIDE_STRINGS = frozenset('{}[]:," \t\r\n+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ')


class AnswerText:
    """The characters of an answer, one by one, and the parts that are made of them."""

    def __init__(self, names: tuple[str, ...], most: int | None, call_id: Callable[[int], str]) -> None:
        self.calls = 0
        self.notices: list[Notice] = []
        self._names, self._most, self._call_id = names, most, call_id
        self._parts: list[Part] = []
        self._back: list[str] = []  # characters that were looked at and not taken
        self.spoken = False
        self._blank = ""  # blanks that are said once something follows them
        self._raw: list[str] | None = None  # what may become a call, as it stands
        self._arguments: list[str] = []
        self._name = self._problem = ""

    def next(self) -> Steps[str]:
        character = self._back.pop() if self._back else (yield)
        if self._raw is not None:
            self._raw.append(character)
        return character

    def back(self, character: str) -> None:
        """Hand the last character back: the next reader finds it."""
        self._back.append(character)
        if self._raw:
            self._raw.pop()

    def solid(self) -> Steps[str]:
        """Pass over blanks and return what follows them."""
        while True:
            character = yield from self.next()
            if not character.isspace():
                return character

    def spoken_blanks(self, more: str = "") -> Steps[str]:
        """Say blanks, and characters that stand between calls; return what follows them."""
        while True:
            character = yield from self.next()
            if not character or not (character.isspace() or character in more):
                return character
            self._blank += character

    def until(self, *markers: str) -> Steps[str]:
        """Say text up to one of the markers, with which something begins that may be a call; "" at the end."""
        held = ""
        while character := (yield from self.next()):
            held += character
            while held and not any(marker.startswith(held) for marker in markers):
                self.say(held[0])
                held = held[1:]
            if held in markers:
                self.mark(held)
                return held
        self.say(held)
        return ""

    def say(self, text: str) -> None:
        whole = self._blank + text
        said = whole.rstrip()
        if said:
            self._parts.append(Said(said))
            self.spoken = True
        self._blank = whole[len(said) :]

    def mark(self, raw: str = "") -> None:
        """Remember what comes from here on, and what came before it."""
        self._raw, self._problem = [raw], ""

    def drop(self) -> None:
        """Forget what was remembered."""
        self._raw = None

    def fail(self, problem: str = "") -> None:
        """Say what was remembered: it is no call."""
        raw, self._raw = "".join(self._raw or ()), None
        self.say(raw)
        problem = self._problem or problem
        if problem:
            self.notices.append(Notice(code="tool_call_as_text", message=f"what looks like a call is text: {problem}"))

    def allows(self, name: str) -> bool:
        """Say whether a function may be called now."""
        if name not in self._names:
            self._problem = f"no function {name[:64]!r} may be called"
        elif self._most is not None and self.calls >= self._most:
            self._problem = "one call was asked for"
        return not self._problem

    def begin(self, name: str, arguments: str = "") -> None:
        """Begin a call of what `allows` let pass: what was remembered is part of it."""
        self._raw, self._blank, self._name, self._arguments = None, "", name, []
        self._parts.append(CallBegun(self.calls, self._call_id(self.calls), name))
        self.calls += 1
        self.argue(arguments)

    def argue(self, text: str) -> None:
        if text:
            self._arguments.append(text)
            self._parts.append(CallArguments(self.calls - 1, text))

    def end(self) -> None:
        self._parts.append(CallEnded(self.calls - 1))
        if not isinstance(from_json("".join(self._arguments)), dict):
            message = f"the arguments of a call of {self._name[:64]!r} are cut or no JSON object"
            self.notices.append(Notice(code="tool_call_incomplete", message=message))

    def close(self) -> None:
        """Say the last blanks, unless calls are all that is there."""
        if self._blank and not self.calls:
            self._parts.append(Said(self._blank))
        self._blank = ""

    def take(self) -> list[Part]:
        """Hand over the parts that have come, joined where they say one thing."""
        parts, self._parts = self._parts, []
        return list(_joined(parts))


def _joined(parts: list[Part]) -> Iterator[Part]:
    texts: list[str] = []
    for place, part in enumerate(parts):
        following = parts[place + 1] if place + 1 < len(parts) else None
        if isinstance(part, Said | CallArguments):
            texts.append(part.text)
            if type(following) is type(part):
                continue
            joined, texts = "".join(texts), []
            yield Said(joined) if isinstance(part, Said) else CallArguments(part.index, joined)
        else:
            yield part


def read_value(answer: AnswerText, sink: Callable[[str], None] = lambda _: None) -> Steps[bool]:
    """Read one JSON value into `sink`; False where it is cut or broken."""
    character = yield from answer.solid()
    if character in ("{", "["):
        sink(character)
        return (yield from read_rest(answer, character, sink))
    if character == '"':
        sink(character)
        return (yield from _in_string(answer, sink))
    while character.isalnum() or character in ("-", "+", "."):
        sink(character)
        character = yield from answer.next()
    answer.back(character)
    return bool(character)


def read_rest(answer: AnswerText, opened: str, sink: Callable[[str], None]) -> Steps[bool]:
    """Read an object or a list up to the brace that closes it; False where something stands there that no JSON has."""
    closers = [_CLOSERS[opened]]
    while closers:
        character = yield from answer.next()
        if not character or character not in _OUTSIDE_STRINGS:
            answer.back(character)
            return False
        if character in "}]" and closers.pop() != character:
            answer.back(character)
            return False
        sink(character)
        if character in _CLOSERS:
            closers.append(_CLOSERS[character])
        elif character == '"' and not (yield from _in_string(answer, sink)):
            return False
    return True


def _in_string(answer: AnswerText, sink: Callable[[str], None]) -> Steps[bool]:
    """Read a string to its closing quote; False where the answer ends in it."""
    escaped = False
    while character := (yield from answer.next()):
        sink(character)
        if character == '"' and not escaped:
            return True
        escaped = character == "\\" and not escaped
    return False


def read_string(answer: AnswerText, longest: int) -> Steps[str | None]:
    """Return what a string says whose first quote was read; None for one that is broken or longer."""
    raw, escaped = '"', False
    while len(raw) < longest and (character := (yield from answer.next())):
        raw += character
        if character == '"' and not escaped:
            value = from_json(raw)
            return value if isinstance(value, str) else None
        escaped = character == "\\" and not escaped
    return None


def read_text(answer: AnswerText) -> Steps[str | None]:
    character = yield from answer.solid()
    if character == '"':
        return (yield from read_string(answer, LONGEST))
    answer.back(character)
    return None


def from_json(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
