"""Rows of training tokens: whole conversations of one length, their weights and their positions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from examples.mini import texts
from examples.mini.tokenizer import TURN_END, TURN_START
from trimkv_cli.mini import language, words
from trimkv_cli.mini.language import STRANGE, Dialogue, Talk, Telling, Utterance, draw_facts, draw_syllable, draw_word

ANSWER_WEIGHT = 1.0
TELLING = Telling(value_first=0.3, openers=0.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Token ids, positions and the weight of each token as a target; all `[B, T]`."""

    ids: Tensor
    positions: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """How often a row opens with notes to summarize, or notes or a story to ask about, and how its conversation is."""

    pairs: float  # of the rows have nothing but pairs
    summaries: float
    notes: float
    tasks: float
    facts: int
    fresh: float
    stories: float = 0.0  # of the rows
    before: float = 0.3  # of the questions about notes and stories stand in front of them
    points: int = 16  # of notes, or facts of a story, at most
    reading: tuple[float, float] = (0.3, 0.75)  # of a conversation's words are its notes or story, from … to
    telling: Telling = TELLING
    numbers: float = 2.0
    alike: float = 0.4  # of the conversations and notes tell facts of one kind only
    reverse: float = 0.5  # of the questions about tables and lists go from what stands last to what stands first
    loose: float = 0.3  # of the points of notes
    shuffle: float = 0.2  # of the other points
    anagrams: float = 0.4  # of the notes have points of the same words
    strange: float = STRANGE  # of the filler holds a number or a strange word
    other_weight: float = 0.05  # of tokens that are no answer; an answer's have 1
    things: int | None = None  # that pairs are about; None: all


PAIRS = Mixture(pairs=1.0, summaries=0.0, notes=0.0, tasks=0.0, facts=0, fresh=0.0)
EARLY = Mixture(pairs=0.3, summaries=0.3, notes=0.1, stories=0.1, before=0.5, tasks=0.3, facts=12, fresh=0.3)
LATE = Mixture(pairs=0.1, summaries=0.4, notes=0.1, stories=0.1, before=0.5, tasks=0.2, facts=20, fresh=0.7)
# After two fifths of the first spell what cannot be foretold, filler, only drowns the rare mistakes. What a question
# before a story wants is learnt early, and needs few rows to stay; lists need the more.
LAST = replace(
    LATE,
    pairs=0.05,
    summaries=0.45,
    stories=0.05,
    numbers=2.5,
    telling=replace(TELLING, value_first=0.2),
    shuffle=0.4,
    other_weight=0.005,
)
# In the second spell: where a list ends is learnt last of all.
LISTS = replace(LAST, summaries=0.65, stories=0.03)


class Encoder:
    """Turns messages into tokens just as the chat template does, and knows which of them are answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._encode = lru_cache(maxsize=4096)(self._encode_text)
        self._tokenizer = tokenizer
        self.turn_start, self.turn_end = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END])
        self.newline = tokenizer.encode("\n")

    def encode(self, messages: tuple[Utterance, ...]) -> tuple[list[int], list[bool]]:
        """Return the token ids and, for each, whether it belongs to a scored answer (its end counts)."""
        ids: list[int] = []
        scored: list[bool] = []
        for message in messages:
            head = [self.turn_start, *self._encode(f"{message.role}\n")]
            body = [*self._encode_text(message.content), self.turn_end]
            ids += [*head, *body, *self.newline]
            scored += [False] * len(head) + [message.scored] * len(body) + [False] * len(self.newline)
        return ids, scored

    def _encode_text(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text))


def make_batch(
    encoder: Encoder, rng: Random, *, rows: int, length: int, max_positions: int, mixture: Mixture = EARLY
) -> Batch:
    """Draw `rows` conversations of `length` tokens each."""
    drawn = [_row(encoder, rng, length, mixture) for _ in range(rows)]
    breaks = (encoder.turn_start, encoder.newline[0])
    positions = [draw_positions(rng, ids, scored, breaks, max_positions) for ids, scored in drawn]
    return Batch(
        ids=torch.tensor([ids for ids, _ in drawn]),
        positions=torch.tensor(positions),
        weights=torch.tensor(
            [[ANSWER_WEIGHT if one else mixture.other_weight for one in scored] for _, scored in drawn]
        ),
    )


def make_conversation(rng: Random, length: int, mixture: Mixture = EARLY) -> Dialogue:
    """Mix all skills in one conversation, or have nothing but pairs, of at least `length` words."""
    if rng.random() < mixture.pairs:
        return _only_pairs(rng, length, mixture.things)
    count = rng.randint(2, max(4, min(mixture.facts, length // 20)))
    alike = rng.random() < mixture.alike
    facts = draw_facts(rng, count, numbers=mixture.numbers, alike=alike)
    talk = Talk(
        rng,
        facts=facts,
        fresh=mixture.fresh,
        telling=mixture.telling,
        strange=mixture.strange,
    )
    draw = rng.random()
    if draw < mixture.summaries + mixture.notes + mixture.stories:
        _open_with_text(talk, draw, length, mixture, alike=alike)
    elif alike:
        while talk.told < count:
            talk.tell()
    table, items = (partial(make, reverse=mixture.reverse) for make in (texts.make_table, texts.make_list))
    while talk.words < length:
        if rng.random() < mixture.tasks:
            make = rng.choice((table, language.make_steps, items))
            talk.messages += make(rng, rows=rng.randint(3, max(4, min(16, length // 12)))).messages
        language.talk_on(talk, min(length, talk.words + rng.randint(30, 200)))
    return talk.done()


def _open_with_text(talk: Talk, draw: float, length: int, mixture: Mixture, *, alike: bool) -> None:
    rng = talk.rng
    most = max(2, min(mixture.points, length // 16))
    points = max(rng.randint(1, most), rng.randint(1, most))  # where long lists end is the hardest to learn
    shape: dict[str, Any] = {
        "length": int(length * rng.uniform(*mixture.reading)),
        "telling": mixture.telling,
        "numbers": mixture.numbers,
        "alike": alike,
        "strange": mixture.strange,
    }
    ask = partial(texts.ask_about, before=mixture.before)
    text: texts.Story
    if draw < mixture.summaries + mixture.notes:
        text = notes = texts.make_notes(
            rng,
            points=points,
            loose=mixture.loose,
            shuffle=mixture.shuffle,
            anagrams=rng.random() < mixture.anagrams,
            **shape,
        )
        opening = texts.summarize_notes(rng, notes) if draw < mixture.summaries else ask(rng, notes)
    else:
        text = texts.make_story(rng, facts=points, **shape)
        opening = ask(rng, text)
    talk.messages += opening.messages
    talk.facts, talk.told = list(text.facts), len(text.facts)


def _only_pairs(rng: Random, length: int, things: int | None) -> Dialogue:
    talk = Talk(rng)
    while talk.words < length:
        add_pairs(talk, most=length // 12, things=things)
    return talk.done()


def draw_positions(
    rng: Random, ids: list[int], scored: list[bool], breaks: tuple[int, int], max_positions: int
) -> list[int]:
    """Draw increasing positions below `max_positions`, with jumps between lines or turns in six rows of ten."""
    turn_start, newline = breaks
    spare = max_positions - len(ids)
    jumps = {}
    if rng.random() < 0.6:
        places = [i for i in range(1, len(ids)) if ids[i] == turn_start or (ids[i - 1] == newline and not scored[i])]
        chosen = rng.sample(places, k=min(len(places), rng.choice((1, 2, 4, 8, 16, 64))))
        total = math.exp(rng.uniform(math.log(64), math.log(spare)))
        shares = [rng.random() for _ in chosen]
        jumps = {place: int(total * share / sum(shares)) for place, share in zip(chosen, shares, strict=True)}
        spare -= sum(jumps.values())
    position = rng.randint(0, max(0, spare - 1))
    positions = []
    for i in range(len(ids)):
        position += jumps.get(i, 0)
        positions.append(position)
        position += 1
    return positions


def _row(encoder: Encoder, rng: Random, length: int, mixture: Mixture) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    scored: list[bool] = []
    while len(ids) < length:  # the estimate of tokens per word is seldom too low
        words = int(1.15 * length / language.TOKENS_PER_WORD)
        more = encoder.encode(make_conversation(rng, words, mixture).messages)
        ids, scored = ids + more[0], scored + more[1]
    return ids[:length], scored[:length]


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
