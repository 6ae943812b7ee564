"""Rules that an answer keeps or breaks, checked by program."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One thing to check of an answer; kinds that need no value have none."""

    kind: str
    value: str = ""

    def kept(self, output: str) -> bool:
        """Say whether an answer keeps the rule; one that says nothing keeps none."""
        said = output.strip()
        return bool(said) and KINDS[self.kind](said, self.value)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


KINDS: dict[str, Callable[[str, str], bool]] = {
    "starts": lambda said, value: said.casefold().startswith(value.casefold()),
    "ends": lambda said, value: said.casefold().rstrip(" .!\"'").endswith(value.casefold().rstrip(".!")),
    "says": lambda said, value: f" {' '.join(_words(value))} " in f" {' '.join(_words(said))} ",
    "avoids": lambda said, value: value.casefold() not in _words(said),
    "lower-case": lambda said, _: said == said.lower(),
    "upper-case": lambda said, _: said == said.upper(),
    "no-digits": lambda said, _: not any(c.isdigit() for c in said),
    "no-commas": lambda said, _: "," not in said,
    "no-exclamation": lambda said, _: "!" not in said,
    "one-line": lambda said, _: "\n" not in said,
    "most-words": lambda said, value: len(said.split()) <= int(value),
    "asks": lambda said, _: said.endswith("?"),
}
