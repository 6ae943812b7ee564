"""Pairs of a thing and its value, one after the other, asked for at once: where a model learns to look up.

Whoever reads "Zubo is my cat" must keep "Zubo" where "cat" stands, to find it from there. Between many things nothing
rewards the first half of that without the second; between two it is learnt within minutes, and then between more.
"""

from __future__ import annotations

from random import Random

from trimkv_cli.mini import words
from trimkv_cli.mini.language import Talk
from trimkv_cli.mini.sentences import draw_syllable, draw_word

LINKS = ("", "is", "is my", "is the", "of my", "is the name of my", "is where my", "opens the")
ENDS = (". ", "; ", ", ")
VALUE_FIRST = 0.7  # of the pairs
MOST_PAIRS = 8


def order_of_things() -> tuple[str, ...]:
    """Return everything that facts are about, in the order in which things are learnt."""
    things = [thing for relation in words.RELATIONS if len(relation.things) > 1 for thing in relation.things]
    Random("things").shuffle(things)
    return tuple(things)


THINGS = order_of_things()


def add_pairs(talk: Talk, *, most: int, things: int | None = None) -> None:
    """Tell up to `most` pairs in one message, and ask for all of them, one, two or all at a time.

    With `things` only the first so many occur, and values are single tokens; without, all may, and values of any kind.
    """
    rng = talk.rng
    known = THINGS[:things]
    count = min(rng.randint(2, max(3, min(MOST_PAIRS, most))), len(known))
    pairs = list(zip(rng.sample(known, count), _values(rng, count, short=things is not None), strict=True))
    link = rng.choice(LINKS) if rng.random() < 0.5 else None
    said = [_say(rng, thing, value, rng.choice(LINKS) if link is None else link) for thing, value in pairs]
    talk.turn(f"{rng.choice(ENDS).join(said)}.", "OK.")
    rng.shuffle(pairs)
    at_once = rng.choice((1, 2, count))
    for start in range(0, count, at_once):
        some = pairs[start : start + at_once]
        question = ", the ".join(thing for thing, _ in some)
        answer = ", the ".join(f"{thing} {value}" for thing, value in some)
        talk.turn(f"The {question}?", f"The {answer}.", scored=True)


def _say(rng: Random, thing: str, value: str, link: str) -> str:
    first, last = (value, thing) if rng.random() < VALUE_FIRST else (thing, value)
    return f"{first} {link} {last}" if link else f"{first} {last}"


def _values(rng: Random, count: int, *, short: bool) -> list[str]:
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[_short_value(rng) if short else _value(rng)] = None
    return list(drawn)


def _short_value(rng: Random) -> str:
    return rng.choice("0123456789") if rng.random() < 0.5 else rng.choice(words.COMMON)


def _value(rng: Random) -> str:
    draw = rng.random()
    if draw < 0.3:
        return _short_value(rng)
    if draw < 0.5:
        return draw_syllable(rng)
    return draw_word(rng) if draw < 0.75 else str(rng.randint(10, 999))
