"""From a document to token ids, and which of them the model itself would have written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimkv_cli.engine.text import Text, unused_characters
from trimkv_cli.train.documents import Content


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


def _render(text: Text, messages: Sequence[dict[str, str]], mark: str) -> Iterator[_Rendered]:
    """Render the conversation up to each answer and after it; what differs is the answer."""
    specials = re.compile("|".join(re.escape(token) for token in text.special_tokens) or r"(?!)")
    whole, answers = "", list[tuple[int, int]]()
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = text.render_marked(messages[:index], mark, answer_next=True)
        after = text.render_marked(messages[: index + 1], mark, answer_next=False)
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
