"""The words of `summarize` to a model, and the cutting of a text that is too long for one pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from trimkv_cli.errors import UsageError
from trimkv_cli.files import as_text
from trimkv_cli.settings import option
from trimkv_cli.ui.plain import to_json

Format = Literal["bullets", "prose", "json"]

TL_DR = "TL;DR:"  # what a model without a chat template continues with a summary
TOO_LONG = "--on-overflow map-reduce (part by part, then the summaries) or --on-overflow rebase (one pass)"
LEAST_ROOM = 64  # tokens that must be left for a summary whose length nobody said
_BASE = "Summarize the text above. Keep to what it says; list its main points."
_PROSE = "Summarize the text above. Keep to what it says; write its main points as flowing text."
_BULLETS = 'Write one point a line, each beginning with "- ".'
_LENGTHS = {
    "short": "Write two or three sentences at most.",
    "medium": "Write about a paragraph.",
    "long": "Go into the details.",
}
_BULLET = re.compile(r"^\s*(?:[-*•–]|\d+[.)])\s+")
# Where a text may be cut, best first; the last cuts anywhere.
_ENDS = (r"(?<=\n)(?=\n)", r"(?<=\n)", r"(?<=[.!?])\s", r"(?<=\s)", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryStyle:
    """What a summary should be like."""

    focus: str | None = option(None, "Tell only what concerns this.", "TEXT")
    length: str | None = option(None, "short, medium, long, or about so many words.", "LENGTH")
    format: Format | None = option(None, "json: one object a file, {input, points}.")

    def __post_init__(self) -> None:
        if self.focus is not None:
            object.__setattr__(self, "focus", as_text(self.focus, "--focus"))
        if self.length is not None and self.length not in _LENGTHS and not _is_count(self.length):
            raise UsageError(
                f"--length {self.length} is neither a number of words nor {', '.join(_LENGTHS)}", hint="--length 100"
            )

    def instruction(self) -> str:
        """Return what is asked of the model under the text."""
        parts = [_PROSE if self.format == "prose" else _BASE]
        if self.focus is not None:
            parts.append(f"Tell only what concerns this: {self.focus}")
        if self.format in ("bullets", "json"):
            parts.append(_BULLETS)
        if self.length is not None:
            parts.append(_LENGTHS.get(self.length) or f"Write about {int(self.length)} words.")
        return " ".join(parts)


def points_of(summary: str) -> list[str]:
    """Take a summary apart into its points: one a line, without what marks them."""
    return [_BULLET.sub("", line).strip() for line in summary.splitlines() if line.strip()]


def as_json(name: str, summary: str) -> str:
    """Return one line of JSON that holds a summary's points, whatever the model wrote around them."""
    return to_json({"input": name, "points": points_of(summary)})


def joined(texts: Sequence[tuple[str, str]]) -> str:
    """Put several documents into one, each under its name."""
    return "\n\n".join(f"# {name}\n\n{text.strip()}" for name, text in texts)


def cut(text: str, room: int, count: Callable[[str], int]) -> list[str]:
    """Cut a text into as few parts as fit `room` tokens each, of about equal length, where a sense unit ends.

    Nothing is lost: the parts joined are the text. `count` counts the tokens of a piece; room must be at least 1.
    """
    pieces = [(piece, count(piece)) for piece in _pieces(text, room, count)]
    total = sum(tokens for _, tokens in pieces)
    size = -(-total // max(1, -(-total // room)))  # as long as the others, where that is possible
    parts, used = [""], 0
    for piece, tokens in pieces:
        if parts[-1] and (used >= size or used + tokens > room):
            parts.append("")
            used = 0
        parts[-1] += piece
        used += tokens
    return parts


def _pieces(text: str, room: int, count: Callable[[str], int], level: int = 0) -> Iterator[str]:
    """Split at the best kind of place until no piece is longer than a fraction of the room."""
    if level + 1 < len(_ENDS):
        for piece in _split(_ENDS[level], text):
            if count(piece) <= max(1, room // 8):
                yield piece
            else:
                yield from _pieces(piece, room, count, level + 1)
        return
    step = max(1, room // 8)
    while text and count(text) > max(1, room // 8):
        while step > 1 and count(text[:step]) > max(1, room // 8):
            step //= 2
        yield text[:step]
        text = text[step:]
    if text:
        yield text


def _split(pattern: str, text: str) -> list[str]:
    """Split at a pattern and keep what it matched at the end of the piece before it."""
    ends = [*(found.end() for found in re.finditer(pattern, text)), len(text)]
    starts = [0, *ends[:-1]]
    return [text[start:end] for start, end in zip(starts, ends, strict=True) if end > start]


def _is_count(text: str) -> bool:
    return text.isdecimal() and 1 <= int(text) <= 10**6
