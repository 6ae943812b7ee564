"""Turns what would stand on a terminal into an SVG that shows the same anywhere."""

from __future__ import annotations

import re
from io import StringIO

from rich.console import Console
from rich.text import Text

_FONT_FACES = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def terminal_picture(painted: str, *, title: str, width: int) -> str:
    """Return an SVG of text with colour codes; it loads no font and no other file."""
    console = Console(
        record=True, width=width, file=StringIO(), force_terminal=True, color_system="256", legacy_windows=False
    )
    console.print(Text.from_ansi(painted), soft_wrap=True)
    svg = _FONT_FACES.sub("", console.export_svg(title=title, unique_id="trimkv"))
    return svg.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")
