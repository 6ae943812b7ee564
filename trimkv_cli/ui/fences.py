"""Fences around code in Markdown: three or more backticks or tildes on a line of their own."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FENCE = re.compile(r"( *)(`{3,}(?=[^`]*$)|~{3,})(.*)")  # backticks again in the line: code within a sentence


@dataclass(frozen=True, slots=True)
class Fence:
    """What opened a block; in a list it may stand further in than three spaces."""

    mark: str
    indent: int

    @classmethod
    def opened_by(cls, line: str) -> Fence | None:
        """Return the fence that a line is, if it is one."""
        found = _FENCE.fullmatch(line)
        return cls(found[2], len(found[1])) if found else None

    def closed_by(self, line: str) -> bool:
        """Say whether a line ends the block: as long a fence of the same kind, and nothing behind it."""
        found = _FENCE.fullmatch(line)
        if found is None or found[3].strip() or len(found[1]) > self.indent + 3:
            return False
        return found[2].startswith(self.mark)


def code_blocks(text: str) -> list[str]:
    """Return what stands in each fenced block, without its fences; one that is cut off ends with the text."""
    blocks: list[list[str]] = []
    fence: Fence | None = None
    for line in text.split("\n"):
        if fence is None:
            fence = Fence.opened_by(line)
            if fence is not None:
                blocks.append([])
        elif fence.closed_by(line):
            fence = None
        else:
            outside = min(fence.indent, len(line) - len(line.lstrip(" ")))
            blocks[-1].append(line[outside:])
    return ["\n".join(block) for block in blocks]
