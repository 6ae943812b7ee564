"""The look of pictures: width, characters and colours, chosen once per stream."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

ColourChoice = Literal["auto", "always", "never"]

_BARS = " ▁▂▃▄▅▆▇█"
_ASCII_BARS = " .:-=+*%#"
# From "gone" to "held by all", of middle lightness: readable on dark and light backgrounds.
_RAMP = tuple(f"color({code})" for code in (244, 97, 61, 67, 73, 72, 71, 107, 142, 172))


@dataclass(frozen=True, slots=True)
class Look:
    """Fix how a picture is drawn; colour only repeats what its characters say."""

    width: int = 80
    ascii: bool = False
    colour: bool = False

    @classmethod
    def of(
        cls, stream: TextIO, *, colour: ColourChoice = "auto", ascii_only: bool = False, width: int | None = None
    ) -> Look:
        """Choose for a stream: colour only on a terminal, plain characters where the encoding has no others."""
        terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        encoding = (stream.encoding or "ascii").lower().replace("-", "")
        wanted = {"always": True, "never": False, "auto": terminal and not os.environ.get("NO_COLOR")}[colour]
        columns = shutil.get_terminal_size().columns if width is None else width
        return cls(width=columns, ascii=ascii_only or not encoding.startswith("utf"), colour=wanted)

    def bar(self, share: float) -> str:
        """Return the character whose height or density says `share` (0 to 1); only nothing at all is blank."""
        ramp = _ASCII_BARS if self.ascii else _BARS
        return ramp[0] if share <= 0 else ramp[max(1, min(len(ramp) - 1, round(share * (len(ramp) - 1))))]

    def digit(self, share: float) -> str:
        """Return a share as tenths: "9" is nine tenths or more, "." is nothing."""
        return "." if share <= 0 else str(min(9, int(share * 10)))

    def style(self, share: float) -> str:
        return _RAMP[0 if share <= 0 else max(1, min(len(_RAMP) - 1, int(share * len(_RAMP))))]

    @property
    def infinity(self) -> str:
        return "no end" if self.ascii else "∞"

    @property
    def rule(self) -> str:
        return "-" if self.ascii else "─"

    @property
    def dot(self) -> str:
        """Return what separates facts in a line."""
        return ", " if self.ascii else " · "

    def join(self, facts: Iterable[str]) -> str:
        """Join facts into as few lines as the width allows, broken only between them."""
        lines = [""]
        for fact in facts:
            longer = f"{lines[-1]}{self.dot if lines[-1] else ''}{fact}"
            if lines[-1] and cell_len(longer) > self.width:
                lines.append(fact)
            else:
                lines[-1] = longer
        return "\n".join(lines)

    def paint(self, text: Text) -> str:
        """Return the picture as characters, with colour codes when this look has colour."""
        out = StringIO()
        self.console(out).print(text, soft_wrap=True, end="")
        return out.getvalue()

    def console(self, out: StringIO, **options: Any) -> Console:
        return Console(
            file=out,
            width=self.width,
            color_system="256" if self.colour else None,
            force_terminal=self.colour,
            no_color=not self.colour,
            legacy_windows=False,
            **options,
        )
