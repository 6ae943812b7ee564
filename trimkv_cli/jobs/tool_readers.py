"""The forms in which models write calls, one reader for each."""

from __future__ import annotations

import re
from collections.abc import Callable

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
    Family,
)
from trimkv_cli.jobs.tool_text import (
    LONGEST,
    AnswerText,
    Steps,
    from_json,
    read_rest,
    read_string,
    read_text,
    read_value,
)

_NAME = re.compile(r"[A-Za-z0-9_.-]")
THINK, THOUGHT = "<think>", "</think>"
_HEADERS = (START, CHANNEL, "to=")


def _hermes(answer: AnswerText) -> Steps[None]:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, of Hermes, Qwen and their like."""
    while marker := (yield from answer.until(OPEN, THINK)):
        if marker == THINK:  # what is thought of calls is none
            answer.fail()
            yield from answer.until(THOUGHT)
            answer.fail()
        elif (yield from _call(answer, marked=True)):
            yield from _closing(answer)


def _llama(answer: AnswerText) -> Steps[None]:
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


def _mistral(answer: AnswerText) -> Steps[None]:
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


def _harmony(answer: AnswerText) -> Steps[None]:
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


def _header(answer: AnswerText, header: str) -> Steps[str]:
    """Read what stands before a message's words; what is no header is said."""
    while not header.endswith(MESSAGE):
        character = yield from answer.next()
        header += character
        begins = header.lstrip()
        if not (character and len(header) < LONGEST) or not any(
            begins.startswith(known) or known.startswith(begins) for known in _HEADERS
        ):
            if any(begins.startswith(known) for known in _HEADERS) and not character:
                answer.drop()  # the answer was cut here
            answer.fail()
            return ""
    return header


def _message(answer: AnswerText, header: str) -> Steps[None]:
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


def _array(answer: AnswerText) -> Steps[None]:
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


def _named(answer: AnswerText) -> Steps[None]:
    name = between = ""
    character = yield from answer.next()
    while character and _NAME.match(character) and len(name) < LONGEST:
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


def _call(answer: AnswerText, *, marked: bool) -> Steps[bool]:
    """Read a call that is one JSON object; else say what came of it, with a notice where it was to be a call."""
    found = yield from _object(answer)
    if not found:
        answer.fail("it does not parse" if marked else "")
    return found


def _object(answer: AnswerText) -> Steps[bool]:
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
            key = yield from read_string(answer, LONGEST)
            character = yield from answer.solid()
        if key is None or character != ":":
            answer.back(character)
            return False
        if key in ("id", "type"):
            if not (yield from read_value(answer)):
                return False
        elif key == "name":
            name = yield from read_text(answer)
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


def _at_once(answer: AnswerText, name: str, arguments: str) -> Steps[bool]:
    answer.begin(name, arguments)
    answer.end()
    yield from _tail(answer)
    return True


def _tail(answer: AnswerText) -> Steps[None]:
    """Pass over what follows the arguments in a call's object; what no JSON has there is text."""
    answer.mark()
    if (yield from read_rest(answer, "{", lambda _: None)):
        answer.drop()
    else:
        answer.fail()


def _streamed(answer: AnswerText, name: str) -> Steps[bool]:
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


def _arguments(answer: AnswerText) -> Steps[None]:
    """Hand on the arguments of a call that has begun, after their first brace."""
    answer.argue("{")
    yield from read_rest(answer, "{", answer.argue)
    answer.end()


def _held(answer: AnswerText) -> Steps[str | None]:
    """Read arguments as a whole: an object, the text of one, or null; None for anything else."""
    pieces: list[str] = []
    if not (yield from read_value(answer, pieces.append)):
        return None
    text = "".join(pieces)
    value = from_json(text)
    if isinstance(value, str):
        text, value = value, from_json(value)
    if value is None and text == "null":
        return "{}"
    return text if isinstance(value, dict) else None


def _closing(answer: AnswerText) -> Steps[None]:
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


READERS: dict[Family, Callable[[AnswerText], Steps[None]]] = {
    "hermes": _hermes,
    "llama": _llama,
    "mistral": _mistral,
    "harmony": _harmony,
}
