"""Facts to be told in a text and asked for later: who or what, which property, and its value, in several wordings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from random import Random

import tomli

_DATA = tomli.loads(Path(__file__).with_name("facts.toml").read_text(encoding="utf-8"))
WORDS: dict[str, list[str]] = _DATA["words"]
SHORT_ANSWERS = 0.25  # of all: the value alone


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact: patterns of its subject and value, and wordings that tell it, ask for it and answer."""

    subject: str
    value: str
    told: tuple[str, ...]
    asked: tuple[str, ...]
    answered: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """What a text tells, and what it can be asked."""

    relation: Relation
    subject: str
    value: str

    def tell(self, rng: Random) -> str:
        return _capital(self._fill(rng.choice(self.relation.told)))

    def ask(self, rng: Random) -> str:
        return _capital(self._fill(rng.choice(self.relation.asked)))

    def answer(self, rng: Random) -> str:
        """Answer with the value alone, or in a sentence."""
        if rng.random() < SHORT_ANSWERS:
            return _capital(self.value) + "."
        return _capital(self._fill(rng.choice(self.relation.answered)))

    def _fill(self, wording: str) -> str:
        return wording.format(s=self.subject, v=self.value)


RELATIONS = tuple(
    Relation(data["subject"], data["value"], *(tuple(data[name]) for name in ("told", "asked", "answered")))
    for data in _DATA["relation"]
)


def draw_facts(rng: Random, count: int) -> list[Fact]:
    """Draw facts of different kinds and subjects."""
    facts: list[Fact] = []
    for relation in rng.sample(RELATIONS, count):
        taken = {fact.subject for fact in facts}
        while (subject := draw(rng, relation.subject)) in taken:
            pass
        facts.append(Fact(relation=relation, subject=subject, value=draw(rng, relation.value)))
    return facts


def draw(rng: Random, pattern: str) -> str:
    """Fill a pattern, as the data file describes them."""
    return re.sub(r"\{([^{}]+)\}", lambda found: _drawn(rng, found[1]), pattern)


def _drawn(rng: Random, name: str) -> str:
    if name in WORDS:
        return draw(rng, rng.choice(WORDS[name]))
    least, _, most = name.removesuffix(" digits").partition("..")
    number = rng.randint(int(least), int(most or least))
    return "".join(rng.choice("0123456789") for _ in range(number)) if name.endswith(" digits") else str(number)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
