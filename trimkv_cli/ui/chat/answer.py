"""One answer as it comes: reasoning set apart, Markdown block by block, below it a line that says what happens."""

from __future__ import annotations

from typing import Literal

from rich.text import Text

from trimkv_cli.ui.chat.blocks import Blocks
from trimkv_cli.ui.chat.markdown import draw_block
from trimkv_cli.ui.chat.screen import Screen
from trimkv_cli.ui.chat.thoughts import Thoughts
from trimkv_cli.ui.plain import neutralise

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
        """Take a piece of text."""
        self._show(self._split.push(text))

    def close(self) -> None:
        """Print what is left and end the line."""
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
