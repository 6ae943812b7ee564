"""Reasoning inside `<think>`: how far an answer is in it, and the tokens that end it when its budget is spent."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from trimkv_cli.errors import UsageError

_OPEN, _CLOSE = "<think>", "</think>"
_GAP = re.compile(r"</think>((?:\\n|\n)+)")  # in a template, which writes a newline in two characters
_WINDOW = 16  # tokens that a tag may be spread over


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkTags:
    """How a model writes its reasoning: what its tokens say, and the ids that close a thought."""

    token_text: Callable[[int], str]
    ids: tuple[int, int] | None  # of the tags, where each is one token
    ends: Collection[int]  # tokens that part an answer from what stands before it
    closing: tuple[int, ...]
    closing_line: tuple[int, ...]  # the same on a line of its own

    @classmethod
    def find(
        cls,
        added: dict[str, int],
        template: str,
        *,
        ends: Collection[int],
        token_text: Callable[[int], str],
        encode: Callable[[str], list[int]],
    ) -> ThinkTags | None:
        """Read them from a tokenizer's `added` tokens and a chat template; None where neither knows both tags."""
        if not all(tag in added or tag in template for tag in (_OPEN, _CLOSE)):
            return None
        gap = _GAP.search(template)
        closing = _CLOSE + (gap[1].replace("\\n", "\n") if gap else "\n\n")
        return cls(
            token_text=token_text,
            ids=(added[_OPEN], added[_CLOSE]) if _OPEN in added and _CLOSE in added else None,
            ends=ends,
            closing=tuple(encode(closing)),
            closing_line=tuple(encode("\n" + closing)),
        )

    def follow(self, prompt: Sequence[int], budget: int | None = None) -> Thought:
        """Begin to follow the answer to a prompt, which may have opened its reasoning already."""
        return Thought(self, inside=self._opened(prompt), budget=budget)

    def _opened(self, prompt: Sequence[int]) -> bool:
        if self.ids is None:
            return "".join(map(self.token_text, prompt[-_WINDOW:])).rstrip().endswith(_OPEN)
        last = next((token for token in reversed(prompt) if token in self.ids or token in self.ends), None)
        return last == self.ids[0]


class Thought:
    """Follow one answer into its reasoning and out of it.

    `tokens` counts those between the tags. With a budget, `forced` is the token that has to come next once that many
    have: the closing tag, on a line of its own. A tag counts where an answer begins, and nowhere else.
    """

    def __init__(self, tags: ThinkTags, *, inside: bool, budget: int | None) -> None:
        self._tags = tags
        self._budget = budget
        self._inside = inside
        self._pieces: tuple[str, ...] = ()
        self._ending: tuple[int, ...] = ()
        self.tokens = 0
        self.over = False
        self._end_if_spent()

    @property
    def forced(self) -> int | None:
        return self._ending[0] if self._ending else None

    def push(self, token: int) -> None:
        """Take the answer's next token."""
        if self.over:
            return
        if self._ending:
            self._ending = self._ending[1:]
            self.over = not self._ending
            return
        self._pieces = (*self._pieces, self._tags.token_text(token))[-_WINDOW:]
        if self._inside:
            self._think()
        else:
            self._begin()
        self._end_if_spent()

    def _begin(self) -> None:
        said = "".join(self._pieces).lstrip()
        if said.startswith(_OPEN):
            self._inside, self._pieces = True, (said.removeprefix(_OPEN),)
        else:
            self.over = not _OPEN.startswith(said)

    def _think(self) -> None:
        self.tokens += 1
        text = "".join(self._pieces)
        if _CLOSE in text:
            self.over = True
            self.tokens -= self._covering(len(text) - text.index(_CLOSE))

    def _covering(self, length: int) -> int:
        """Count the latest tokens that hold the last `length` characters."""
        count = 0
        while length > 0:
            count += 1
            length -= len(self._pieces[-count])
        return min(count, self.tokens)

    def _end_if_spent(self) -> None:
        if self._budget is None or not self._inside or self.over or self.tokens < self._budget:
            return
        on_a_line = "".join(self._pieces).endswith("\n")
        self._ending = self._tags.closing if on_a_line else self._tags.closing_line


def no_thoughts(model: str) -> UsageError:
    """Return what is wrong with a budget of reasoning for a model that knows none."""
    hint = "leave out --think-budget, or reasoning_budget"
    return UsageError(f"{model} knows no {_OPEN}: it has no reasoning to end", hint=hint, param="reasoning_budget")
