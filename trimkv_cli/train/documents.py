"""Training documents: data files checked line by line, and their tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimkv_cli.engine.chat_template import unused_characters
from trimkv_cli.engine.text import Text
from trimkv_cli.errors import InputError, NotUtf8, UsageError
from trimkv_cli.files import as_text

MOST_NAMED = 5
MOST_ENCODED = 8
CONVERSATIONS = (".jsonl", ".ndjson")

Content = str | list[dict[str, str]]  # a plain text, or the messages of a conversation


@dataclass(frozen=True, slots=True)
class DocumentPlace:
    """Where one document lies; `line` counts from 1, and is 0 for a text file, which is one document."""

    path: Path
    line: int
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else str(self.path)


class DataFiles:
    """Own the places of all documents, in the order given, and the hash of all bytes read.

    `*.jsonl` holds a document per line: {"messages": [...]} or {"text": "..."}. Any other file is one plain text.

    Raises:
        InputError: a file that cannot be read, or lines that hold no document; they are named.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.places: list[DocumentPlace] = []
        digest = sha256()
        bad: list[str] = []
        for path in paths:
            for place, data in _split(path):
                digest.update(data)
                try:
                    if data.strip():
                        _parse(data, place)
                        self.places.append(place)
                except ValueError as error:
                    bad.append(f"{place}: {error}")
        self.sha256 = digest.hexdigest()
        if bad:
            more = f"; and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
            hint = 'a line is {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}'
            raise InputError("; ".join(bad[:MOST_NAMED]) + more, hint=hint)
        if not self.places:
            raise InputError(
                f"{', '.join(map(str, paths))}: no data to train on", hint="give files with lines or text in them"
            )

    def read(self, index: int) -> Content:
        """Read a document again.

        Raises:
            InputError: the file has changed since it was checked.
        """
        place = self.places[index]
        try:
            with place.path.open("rb") as file:
                file.seek(place.offset)
                return _parse(file.read(place.size), place)
        except (OSError, ValueError) as error:
            raise InputError(f"{place}: {error}", hint="leave the data alone while training") from error


def _split(path: Path) -> Iterator[tuple[DocumentPlace, bytes]]:
    try:
        if path.suffix not in CONVERSATIONS:
            data = path.read_bytes()
            yield DocumentPlace(path, 0, 0, len(data)), data
            return
        with path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                yield DocumentPlace(path, number, offset, len(line)), line
                offset += len(line)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="give a .jsonl or a text file") from error


def _parse(data: bytes, place: DocumentPlace) -> Content:
    """Return the document; ValueError says what is wrong."""
    if not place.line:
        return _decoded(data)
    try:
        line = json.loads(data.strip())
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(line, dict):
        raise ValueError(f"a JSON {type(line).__name__}, not an object")
    if "messages" in line:
        return _messages(line["messages"])
    if isinstance(line.get("text"), str) and line["text"]:
        return _utf8(line["text"])
    raise ValueError('neither "messages" nor "text"')


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {number} is not UTF-8") from None


def _utf8(text: str) -> str:
    try:
        return as_text(text, "a text")
    except NotUtf8 as error:
        raise ValueError(error.message) from None


def _messages(found: Any) -> list[dict[str, str]]:
    if not isinstance(found, list):
        raise ValueError('"messages" is not a list')
    for number, message in enumerate(found, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} has no role")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} has no text as content")
    if not any(message["role"] == "assistant" for message in found):
        raise ValueError("no assistant message to learn from")
    if found[0]["role"] == "assistant":
        raise ValueError("the first message is the assistant's")
    return [{key: _utf8(text) for key, text in message.items() if isinstance(text, str)} for message in found]


class Tokens(NamedTuple):
    """Ids, and for each whether the loss asks for it."""

    ids: NDArray[np.int32]
    wanted: NDArray[np.bool_]


class _Rendered(NamedTuple):
    text: str
    answers: list[tuple[int, int]]  # from the first character of an answer to after the token that ends it


def encode_document(text: Text, content: Content) -> list[Tokens]:
    """Encode a plain text, all of it wanted, or a conversation, of which the answers are.

    Where a template rewrites earlier answers (it drops their reasoning), a conversation becomes several documents:
    each answer is learnt in the form that it is written in.

    Raises:
        UsageError: the chat template refuses the conversation.
        UnsupportedModel: the model has no chat template.
    """
    if isinstance(content, str):
        ids = np.array(text.encode(content), dtype=np.int32)
        return [Tokens(ids, np.ones(len(ids), dtype=np.bool_))]
    (mark,) = unused_characters([part for message in content for part in message.values()], 1)
    return [_encode(text, rendered, mark) for rendered in _render(text, content, mark)]


Load = Callable[[int], list[Tokens]]


def encoder(data: DataFiles, text: Text) -> Load:
    """Return what encodes a document by its number; it raises InputError where one cannot be."""

    def load(index: int) -> list[Tokens]:
        try:
            return encode_document(text, data.read(index))
        except InputError:
            raise
        except UsageError as error:
            raise InputError(f"{data.places[index]}: {error.message}", hint=error.hint) from error

    return load


def too_long(data: DataFiles, load: Load, *, context: int, most: int) -> Iterator[str]:
    """Say which context, `most` at most, holds the longest conversation, where the one asked for does not.

    The largest in bytes are looked at. Pieces of a text teach as much as the whole: of those nothing is said.
    """
    largest = sorted(range(len(data.places)), key=lambda index: -data.places[index].size)[:MOST_ENCODED]
    talks = [(len(each.ids), data.places[at]) for at in largest for each in load(at) if not each.wanted.all()]
    length, place = max(talks, key=lambda talk: talk[0], default=(0, None))
    if length > context:
        holds = f"--context {length} holds it" if length <= most else f"the model allows --context {most}"
        yield f"{place} has {length:,} tokens and is cut, and a piece without an answer teaches nothing: {holds}"


def _render(text: Text, messages: Sequence[dict[str, str]], mark: str) -> Iterator[_Rendered]:
    """Render the conversation up to each answer and after it; what differs is the answer."""
    specials = re.compile("|".join(re.escape(token) for token in text.special_tokens) or r"(?!)")
    whole, answers = "", list[tuple[int, int]]()
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = text.template.render(messages[:index], mark=mark, answer_next=True)
        after = text.template.render(messages[: index + 1], mark=mark, answer_next=False)
        if answers and _common(whole, after) < answers[-1][1]:
            yield _Rendered(whole, answers)
            answers = []
        start = _common(before, after)
        ending = specials.search(after, start)
        whole, answers = after, [*answers, (start, ending.end() if ending else len(after.rstrip()))]
    yield _Rendered(whole, answers)


def _encode(text: Text, rendered: _Rendered, mark: str) -> Tokens:
    """Encode answers and what is between them apart, as they are when the model writes the answers."""
    parts, wanted, place = list[str](), list[bool](), 0
    for start, end in rendered.answers:
        for piece, is_answer in ((rendered.text[place:start], False), (rendered.text[start:end], True)):
            split = piece.split(mark)
            parts += split
            wanted += [is_answer] * len(split)
        place = end
    encoded = text.encode_parts(parts)
    lengths = [len(ids) for ids in encoded]
    ids = np.array([token_id for ids in encoded for token_id in ids], dtype=np.int32)
    return Tokens(ids, np.repeat(np.array(wanted, dtype=np.bool_), lengths))


def _common(left: str, right: str) -> int:
    """Count the characters that two texts begin with alike."""
    if right.startswith(left):
        return len(left)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
