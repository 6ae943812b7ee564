"""Draw one block of Markdown: nothing of its text gets lost, and nothing in it can drive the terminal."""

from __future__ import annotations

import re
from io import StringIO

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Heading, Markdown
from rich.text import Text

from trimkv_cli.ui.look import Look
from trimkv_cli.ui.plain import neutralise

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
    Console(
        file=out,
        width=look.width,
        color_system="256" if look.colour else None,
        force_terminal=look.colour,
        no_color=not look.colour,
        legacy_windows=False,
        emoji=False,
        highlight=False,
    ).print(markdown)
    drawn = _AROUND.sub("", _PADDING.sub(r"\1", out.getvalue()))
    return drawn.translate(_ASCII) if look.ascii else drawn
