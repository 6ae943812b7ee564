"""Tell a model's reasoning from its answer while both stream by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

Kind = Literal["thought", "answer"]
_OPEN, _CLOSE = "<think>", "</think>"


class Thoughts:
    """Split text at `<think>`, which counts only where an answer begins, and at its `</think>`."""

    def __init__(self, *, inside: bool = False) -> None:
        self._held = ""
        self._state: Literal["start", "thought", "answer"] = "thought" if inside else "start"

    def push(self, text: str) -> list[tuple[Kind, str]]:
        """Take more text and return what is certain of it."""
        self._held += text
        return [(kind, piece) for kind, piece in self._advance() if piece]

    def finish(self) -> list[tuple[Kind, str]]:
        """Return what was held back."""
        held, self._held = self._held, ""
        kind: Kind = "thought" if self._state == "thought" else "answer"
        return [(kind, held)] if held else []

    def _advance(self) -> Iterator[tuple[Kind, str]]:
        if self._state == "start":
            begun = self._held.lstrip()
            if begun.startswith(_OPEN):
                self._state, self._held = "thought", begun.removeprefix(_OPEN).lstrip("\n")
            elif not _OPEN.startswith(begun):
                self._state = "answer"
        if self._state == "thought":
            yield "thought", self._until_close()
        if self._state == "answer":
            held, self._held = self._held, ""
            yield "answer", held

    def _until_close(self) -> str:
        thought, closed, rest = self._held.partition(_CLOSE)
        if closed:
            self._state, self._held = "answer", rest.lstrip("\n")
            return thought
        unsure = next((n for n in range(len(_CLOSE) - 1, 0, -1) if self._held.endswith(_CLOSE[:n])), 0)
        certain = len(self._held) - unsure
        self._held, piece = self._held[certain:], self._held[:certain]
        return piece
