"""Cut a stream of Markdown into blocks, each of which is complete when it comes out."""

from __future__ import annotations

import re

from trimkv_cli.ui.fences import Fence

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
