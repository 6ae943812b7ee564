"""An answer as it grows on the terminal: reasoning, Markdown in whole blocks, and a line about its progress."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from io import StringIO
from typing import Literal

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Heading, Markdown
from rich.text import Text

from trimkv_cli.ui.chat.screen import Screen
from trimkv_cli.ui.fences import Fence
from trimkv_cli.ui.look import Look
from trimkv_cli.ui.plain import neutralise

_LIST = re.compile(r" {0,3}([-*+]|\d{1,9}[.)])\s")


class Blocks:
    """Collect lines until a block closes: at a blank line, a closing fence, or before what cannot belong to it."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._partial = ""
        self._fence: Fence | None = None

    @property
    def open_text(self) -> str:
        """Return what has come of the block that is still open."""
        return "\n".join([*self._lines, self._partial])

    def push(self, text: str) -> list[str]:
        """Take more text and return the blocks that it completes."""
        *lines, self._partial = (self._partial + text).split("\n")
        return [block for line in lines if (block := self._take(line))]

    def finish(self) -> list[str]:
        """Return what is left as a block, however it ends."""
        last = [block for line in [self._partial] if line and (block := self._take(line))]
        self._partial, self._fence = "", None
        rest = self._close()
        return [*last, *([rest] if rest else [])]

    def _take(self, line: str) -> str:
        """Take a whole line; return the block that it closes, or an empty string."""
        if self._fence is not None:
            self._lines.append(line)
            if not self._fence.closed_by(line):
                return ""
            self._fence = None
            return self._close()
        if not line.strip():
            if not self._is_list():
                return self._close()
            self._lines.append(line)
            return ""
        closed = self._close() if self._is_list() and not self._lines[-1].strip() and not _goes_on(line) else ""
        fence = Fence.opened_by(line)
        if fence is not None and not self._is_list():
            before, self._lines, self._fence = self._lines, [line], fence
            return closed or "\n".join(before)
        self._lines.append(line)
        return closed

    def _is_list(self) -> bool:
        return bool(self._lines) and bool(_LIST.match(self._lines[0]))

    def _close(self) -> str:
        block, self._lines = "\n".join(self._lines).strip("\n"), []
        return block


def _goes_on(line: str) -> bool:
    """Say whether a line after a blank one still belongs to a list."""
    return line.startswith(("  ", "\t")) or bool(_LIST.match(line))


# Rich draws nothing for these: as plain text they stay.
_LEFT_AS_TEXT = ["html_inline", "html_block", "image", "reference"]
_CODES = r"(?:\x1b\[[0-9;]*m)*"
_PADDING = re.compile(rf"[ \t]+({_CODES})$", re.MULTILINE)
_AROUND = re.compile(rf"\A(?:{_CODES}\n)+|(?:\n{_CODES})+\Z")
_ASCII = str.maketrans({"•": "*", "─": "-", "━": "=", "▌": "|", "│": "|"})


class _LeftHeading(Heading):
    """A heading where reading begins."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = Text("#" * int(self.tag[1:]) + " ", "bold")
        yield text.append_text(self.text)


class _Block(Markdown):
    elements = {**Markdown.elements, "heading_open": _LeftHeading}  # noqa: RUF012 - as in the base class


def draw_block(block: str, look: Look) -> str:
    """Return a block as lines of at most the look's width, without blank lines around it."""
    markdown = _Block("", code_theme="ansi_dark", hyperlinks=False)
    markdown.parsed = MarkdownIt().enable(["strikethrough", "table"]).disable(_LEFT_AS_TEXT).parse(neutralise(block))
    out = StringIO()
    look.console(out, emoji=False, highlight=False).print(markdown)
    drawn = _AROUND.sub("", _PADDING.sub(r"\1", out.getvalue()))
    return drawn.translate(_ASCII) if look.ascii else drawn


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


_FIRST_S = 0.2  # a quick answer needs no line


class Meter:
    """Draw the line at most every `interval_s` seconds, from counts that the host has anyway."""

    def __init__(self, screen: Screen, view: AnswerView, *, seen: int, slots: int, interval_s: float) -> None:
        self.generated = 0
        self._screen = screen
        self._view = view
        self._seen = seen
        self._slots = slots
        self._interval_s = interval_s
        self._next = time.monotonic() + _FIRST_S
        self._first_token = 0.0

    @property
    def due(self) -> bool:
        """Say whether it is time to draw; asked after every step."""
        now = time.monotonic()
        if self.generated and not self._first_token:
            self._first_token = now
        return now >= self._next and self._screen.moves and not self._view.mid_line

    def draw(self, progress: tuple[int, int] | None) -> None:
        """Draw the line for so many tokens of the prompt that have been read, of so many; None = not known."""
        now = time.monotonic()
        self._next = now + self._interval_s
        if not self.generated:
            waits = "waiting" if progress is None else f"reading {progress[0]:,} of {progress[1]:,} tokens"
            self._screen.passing(waits)
            return
        look, facts = self._screen.look, []
        if progress is not None:
            seen = self._seen + progress[0] + self.generated
            facts.append(f"kept {min(seen, self._slots):,}/{seen:,}")
        if self.generated > 1 and now > self._first_token:
            facts.append(f"{(self.generated - 1) / (now - self._first_token):.1f} tok/s")
        counts = look.dot.join(facts)
        room = look.width - len(counts) - 6
        preview = self._view.preview[-room:] if room > 0 else ""
        self._screen.passing(f"{preview}{look.dot if preview else ''}{counts}")


ThoughtStyle = Literal["show", "fold"]


class AnswerView:
    """Print an answer piece by piece, without ever changing what is printed."""

    def __init__(
        self, screen: Screen, *, markdown: bool = True, thoughts: ThoughtStyle = "show", in_thought: bool = False
    ) -> None:
        self._screen = screen
        self._markdown = markdown
        self._fold = thoughts == "fold"
        self._split = Thoughts(inside=in_thought)
        self._blocks = Blocks()
        self._thought = ""
        self._thought_words = 0
        self._printed_blocks = 0
        self._held_newlines = ""
        self._any_plain = False

    @property
    def preview(self) -> str:
        """Return the last line of what is not printed yet."""
        waiting = self._thought or (self._blocks.open_text if self._markdown else "")
        return neutralise(waiting.rstrip().rpartition("\n")[2])

    @property
    def mid_line(self) -> bool:
        """Say whether the cursor stands behind text, where no passing line can be shown."""
        return self._any_plain

    def push(self, text: str) -> None:
        self._show(self._split.push(text))

    def close(self) -> None:
        self._show(self._split.finish())
        self._end_thought()
        for block in self._blocks.finish():
            self._print_block(block)
        if self._any_plain or not self._printed_blocks:
            self._screen.print()

    def _show(self, pieces: list[tuple[Literal["thought", "answer"], str]]) -> None:
        for kind, piece in pieces:
            if kind == "thought":
                self._add_thought(piece)
            else:
                self._end_thought()
                self._add_answer(piece)

    def _add_answer(self, piece: str) -> None:
        if self._markdown:
            for block in self._blocks.push(piece):
                self._print_block(block)
            return
        text = self._held_newlines + neutralise(piece)
        body = text.rstrip("\n")
        self._held_newlines = text[len(body) :]
        if body:
            self._screen.print(body, end="")
            self._any_plain = True

    def _print_block(self, block: str) -> None:
        drawn = draw_block(block, self._screen.look)
        self._screen.print(("\n" if self._printed_blocks else "") + drawn)
        self._printed_blocks += 1

    def _add_thought(self, piece: str) -> None:
        *lines, self._thought = (self._thought + piece).split("\n")
        for line in lines:
            self._print_thought(line)

    def _print_thought(self, line: str) -> None:
        self._thought_words += len(line.split())
        if not self._fold:
            look = self._screen.look
            self._screen.print(look.paint(Text(f"{'|' if look.ascii else '┆'} {neutralise(line)}".rstrip(), "dim")))

    def _end_thought(self) -> None:
        if self._thought:
            self._print_thought(self._thought)
        if self._thought_words:
            look = self._screen.look
            if self._fold:
                mark = "|" if look.ascii else "┆"
                note = f"{mark} {self._thought_words:,} words of reasoning (/set thoughts show)"
                self._screen.print(look.paint(Text(note, "dim")))
            self._screen.print()
        self._thought, self._thought_words = "", 0
