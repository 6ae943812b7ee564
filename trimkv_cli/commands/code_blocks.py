"""Takes code out of an answer: what stands between fences in Markdown."""

from __future__ import annotations

import re

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})\s*([^`]*)$")


def first_code_block(text: str) -> str | None:
    """Return the first fenced block without its fences, None without one; a block cut off ends with the text."""
    lines = iter(text.split("\n"))
    for line in lines:
        opened = _FENCE.match(line)
        if opened is None:
            continue
        code: list[str] = []
        for inner in lines:
            closed = _FENCE.match(inner)
            if closed is not None and closed[1].startswith(opened[1]) and not closed[2].strip():
                break
            code.append(inner)
        return "\n".join(code)
    return None
