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


_COMMON = {  # words that hardly a sentence of a language goes without
    "English": " the a an is are was of and to in that it this for with as i you he she on by at ",
    "French": " le la les l un une des du de d et est dans que qui il elle pour avec sur au ce je ",
    "Spanish": " el la los las un una de del y es en que por con se su para lo al yo ",
    "Italian": " il lo la gli le un una di del della e è in che per con si da dei nel io ",
    "German": " der die das ein eine einer und ist in den dem des von zu mit sich nicht es im ich ",
}
LANGUAGES = tuple(_COMMON)


def _is_language(said: str, name: str) -> bool:
    """Say whether an answer has more of a language's most common words, two or more, than of any other's."""
    words = _words(said)
    counts = {language: sum(f" {word} " in common for word in words) for language, common in _COMMON.items()}
    return counts[name] > max(1, *(count for language, count in counts.items() if language != name))


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
    "language": _is_language,
    "asks": lambda said, _: said.endswith("?"),
}
