"""Calls of tools in an answer, read from its text piece by piece."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import orjson

from trimkv_cli.events import Notice
from trimkv_cli.jobs.bodies import ToolCall
from trimkv_cli.jobs.lines import Item
from trimkv_cli.jobs.tool_formats import (
    ARGS,
    CALL_ID,
    CHANNEL,
    CLOSE,
    ENDS,
    MESSAGE,
    OPEN,
    PYTHON,
    START,
    TOOL_CALLS,
    CallFormat,
)


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
        self._answer = _Answer(names, None if parallel else 1, call_id)
        self._steps: Steps[None] | None = _READERS[form.family](self._answer)
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


T = TypeVar("T")
Steps: TypeAlias = Generator[None, str, T]  # each yield asks for the next character; "" is the end of the answer

_NAME = re.compile(r"[A-Za-z0-9_.-]")
_LONGEST = 1024  # of a key or a name, and of a header
THINK, THOUGHT = "<think>", "</think>"
_HEADERS = (START, CHANNEL, "to=")
_CLOSERS = {"{": "}", "[": "]"}
_OUTSIDE_STRINGS = frozenset('{}[]:," \t\r\n+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ')


class _Answer:
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
        if not isinstance(_from_json("".join(self._arguments)), dict):
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


def _hermes(answer: _Answer) -> Steps[None]:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, of Hermes, Qwen and their like."""
    while marker := (yield from answer.until(OPEN, THINK)):
        if marker == THINK:  # what is thought of calls is none
            answer.fail()
            yield from answer.until(THOUGHT)
            answer.fail()
        elif (yield from _call(answer, marked=True)):
            yield from _closing(answer)


def _llama(answer: _Answer) -> Steps[None]:
    """`{"name": …, "parameters": {…}}` where the answer begins, after a call or after `<|python_tag|>`."""
    bare = True
    while True:
        if bare:
            character = yield from answer.spoken_blanks(";," if answer.calls else "")
            answer.back(character)
            if character == "{":
                answer.mark()
                bare = yield from _call(answer, marked=False)
                continue
        if not (yield from answer.until(PYTHON)):
            return
        bare = yield from _call(answer, marked=True)


def _mistral(answer: _Answer) -> Steps[None]:
    """`[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`, or `[TOOL_CALLS]name[ARGS]{…}` for each call."""
    while (yield from answer.until(TOOL_CALLS)):
        character = yield from answer.solid()
        if character == "[":
            yield from _array(answer)
            continue
        answer.back(character)
        if character == "{":
            yield from _call(answer, marked=True)
        else:
            yield from _named(answer)


def _harmony(answer: _Answer) -> Steps[None]:
    """Messages on channels, of gpt-oss: those to functions are calls, the words of the others are said."""
    begun = ""
    while True:
        character = yield from answer.next()
        answer.back(character)
        if begun or (character and character in "< "):
            answer.mark(begun)
            header = yield from _header(answer, begun)
            yield from _message(answer, header)
        begun = yield from answer.until(START, CHANNEL, *ENDS)
        if not begun:
            return
        answer.drop()
        begun = "" if begun in ENDS else begun


def _header(answer: _Answer, header: str) -> Steps[str]:
    """Read what stands before a message's words; what is no header is said."""
    while not header.endswith(MESSAGE):
        character = yield from answer.next()
        header += character
        begins = header.lstrip()
        if not (character and len(header) < _LONGEST) or not any(
            begins.startswith(known) or known.startswith(begins) for known in _HEADERS
        ):
            if any(begins.startswith(known) for known in _HEADERS) and not character:
                answer.drop()  # the answer was cut here
            answer.fail()
            return ""
    return header


def _message(answer: _Answer, header: str) -> Steps[None]:
    recipient = re.search(r"to=([^\s<]+)", header)
    if not header:
        return
    if recipient is None:
        answer.drop()
        answer.say("\n\n" if answer.spoken else "")
        return
    name = recipient[1].removeprefix("functions.")
    character = yield from answer.solid()
    if character == "{" and answer.allows(name):
        answer.begin(name)
        yield from _arguments(answer)
    else:
        answer.back(character)
        answer.fail("its arguments are no JSON object")


def _array(answer: _Answer) -> Steps[None]:
    """Read calls up to the end of a list that has begun."""
    while (yield from _call(answer, marked=True)):
        answer.mark()
        character = yield from answer.solid()
        if character != ",":
            if character and character != "]":
                answer.back(character)
                answer.fail()
            answer.drop()
            return


def _named(answer: _Answer) -> Steps[None]:
    name = between = ""
    character = yield from answer.next()
    while character and _NAME.match(character) and len(name) < _LONGEST:
        name += character
        character = yield from answer.next()
    while character and character != "{" and len(between) < len(CALL_ID + ARGS) + 64:
        between += character
        character = yield from answer.next()
    head = rf"\s*({re.escape(CALL_ID)}\s*\w*)?\s*({re.escape(ARGS)})?\s*"
    if character == "{" and re.fullmatch(head, between) and answer.allows(name):
        answer.begin(name)
        yield from _arguments(answer)
    else:
        answer.back(character)
        answer.fail("it does not parse")


def _call(answer: _Answer, *, marked: bool) -> Steps[bool]:
    """Read a call that is one JSON object; else say what came of it, with a notice where it was to be a call."""
    found = yield from _object(answer)
    if not found:
        answer.fail("it does not parse" if marked else "")
    return found


def _object(answer: _Answer) -> Steps[bool]:
    """Read `{"name": …, "arguments": {…}}`; False at the first character that shows that it is no call."""
    character = yield from answer.solid()
    if character != "{":
        answer.back(character)
        return False
    name: str | None = None
    arguments: str | None = None
    while (character := (yield from answer.solid())) != "}":
        if character == ",":
            continue
        key = None
        if character == '"':
            key = yield from _string(answer, _LONGEST)
            character = yield from answer.solid()
        if key is None or character != ":":
            answer.back(character)
            return False
        if key in ("id", "type"):
            if not (yield from _value(answer)):
                return False
        elif key == "name":
            name = yield from _text(answer)
            if name is None or not answer.allows(name):
                return False
        elif key not in ("arguments", "parameters"):
            return False
        elif name is not None:
            return (yield from _streamed(answer, name))
        else:
            arguments = yield from _held(answer)
            if arguments is None:
                return False
        if name is not None and arguments is not None:
            return (yield from _at_once(answer, name, arguments))
    if name is not None:
        answer.begin(name, "{}")
        answer.end()
    return name is not None


def _at_once(answer: _Answer, name: str, arguments: str) -> Steps[bool]:
    answer.begin(name, arguments)
    answer.end()
    yield from _tail(answer)
    return True


def _tail(answer: _Answer) -> Steps[None]:
    """Pass over what follows the arguments in a call's object; what no JSON has there is text."""
    answer.mark()
    if (yield from _rest(answer, "{", lambda _: None)):
        answer.drop()
    else:
        answer.fail()


def _streamed(answer: _Answer, name: str) -> Steps[bool]:
    """Hand arguments on as they come; those that are no object are read as a whole first."""
    character = yield from answer.solid()
    if character == "{":
        answer.begin(name)
        yield from _arguments(answer)
        yield from _tail(answer)
        return True
    answer.back(character)
    arguments = yield from _held(answer)
    return arguments is not None and (yield from _at_once(answer, name, arguments))


def _arguments(answer: _Answer) -> Steps[None]:
    """Hand on the arguments of a call that has begun, after their first brace."""
    answer.argue("{")
    yield from _rest(answer, "{", answer.argue)
    answer.end()


def _held(answer: _Answer) -> Steps[str | None]:
    """Read arguments as a whole: an object, the text of one, or null; None for anything else."""
    pieces: list[str] = []
    if not (yield from _value(answer, pieces.append)):
        return None
    text = "".join(pieces)
    value = _from_json(text)
    if isinstance(value, str):
        text, value = value, _from_json(value)
    if value is None and text == "null":
        return "{}"
    return text if isinstance(value, dict) else None


def _closing(answer: _Answer) -> Steps[None]:
    """Pass over the marker that closes a call; what stands there in its place is text."""
    answer.mark()
    for place, expected in enumerate(CLOSE):
        character = yield from (answer.next() if place else answer.solid())
        if character != expected:
            if character:
                answer.back(character)
                answer.fail()
            break
    answer.drop()


def _value(answer: _Answer, sink: Callable[[str], None] = lambda _: None) -> Steps[bool]:
    """Read one JSON value into `sink`; False where it is cut or broken."""
    character = yield from answer.solid()
    if character in ("{", "["):
        sink(character)
        return (yield from _rest(answer, character, sink))
    if character == '"':
        sink(character)
        return (yield from _in_string(answer, sink))
    while character.isalnum() or character in ("-", "+", "."):
        sink(character)
        character = yield from answer.next()
    answer.back(character)
    return bool(character)


def _rest(answer: _Answer, opened: str, sink: Callable[[str], None]) -> Steps[bool]:
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


def _in_string(answer: _Answer, sink: Callable[[str], None]) -> Steps[bool]:
    """Read a string to its closing quote; False where the answer ends in it."""
    escaped = False
    while character := (yield from answer.next()):
        sink(character)
        if character == '"' and not escaped:
            return True
        escaped = character == "\\" and not escaped
    return False


def _string(answer: _Answer, longest: int) -> Steps[str | None]:
    """Return what a string says whose first quote was read; None for one that is broken or longer."""
    raw, escaped = '"', False
    while len(raw) < longest and (character := (yield from answer.next())):
        raw += character
        if character == '"' and not escaped:
            value = _from_json(raw)
            return value if isinstance(value, str) else None
        escaped = character == "\\" and not escaped
    return None


def _text(answer: _Answer) -> Steps[str | None]:
    character = yield from answer.solid()
    if character == '"':
        return (yield from _string(answer, _LONGEST))
    answer.back(character)
    return None


def _from_json(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


_READERS: dict[str, Callable[[_Answer], Steps[None]]] = {
    "hermes": _hermes,
    "llama": _llama,
    "mistral": _mistral,
    "harmony": _harmony,
}
