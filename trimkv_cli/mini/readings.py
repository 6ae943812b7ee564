"""Texts to read and to be asked about: notes with marked points, tables, arrows and lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from trimkv_cli.mini import words
from trimkv_cli.mini.language import Conversation, Talk
from trimkv_cli.mini.sentences import Fact, draw_facts, draw_value, draw_words, filler, loose_sentence, shuffled


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes:
    """A text of filler lines with marked points: "Note 3: …". `facts` are those that points tell."""

    text: str
    points: tuple[str, ...]
    facts: tuple[Fact, ...]

    @property
    def summary(self) -> str:
        """The points as a list, one per line."""
        return "\n".join(f"- {number}: {point}" for number, point in enumerate(self.points, start=1))


def make_notes(
    rng: Random,
    *,
    points: int = 6,
    length: int = 300,
    unseen: bool = False,
    value_first: float = 0.0,
    numbers: float = 1.0,
    loose: float = 0.0,
    shuffle: float = 0.0,
) -> Notes:
    """Write about `length` words of filler lines, with `points` (at least one) marked points spread over them.

    The share `loose` of all points but the first tells no fact: words in any order, to be copied as they stand. So does
    the share `shuffle` of the others, whose words are those of a fact.
    """
    facts = draw_facts(rng, points, numbers=numbers)
    told = [fact.tell(rng, unseen=unseen, value_first=value_first) for fact in facts]
    others = [index for index in range(1, points) if loose and rng.random() < loose]
    for index in others:
        told[index] = loose_sentence(rng)
    mixed = [index for index in range(1, points) if shuffle and index not in others and rng.random() < shuffle]
    for index in mixed:
        told[index] = shuffled(rng, told[index])
    mark = rng.choice(words.MARKS)
    lines: list[str] = []
    count = sum(len(point.split()) + 2 for point in told)
    while count < length:
        lines.append(filler(rng, rng.randint(1, 3)))
        count += len(lines[-1].split())
    places = sorted(rng.randrange(len(lines) + 1) for _ in told)
    for index in reversed(range(points)):
        lines.insert(places[index], f"{mark} {index + 1}: {told[index]}")
    if rng.random() < 0.5:
        lines.insert(0, rng.choice(words.TITLES))
    kept = (fact for index, fact in enumerate(facts) if index not in (*others, *mixed))
    return Notes(text="\n".join(lines), points=tuple(told), facts=tuple(kept))


def summarize_notes(rng: Random, notes: Notes, *, unseen: bool = False) -> Conversation:
    """Ask for the marked points of a text, in the form in which `trimkv summarize` does."""
    talk = Talk(rng, unseen=unseen)
    request = rng.choice(words.UNSEEN_SUMMARY_REQUESTS if unseen else words.SUMMARY_REQUESTS)
    talk.turn(f"{notes.text}\n\n{request}", notes.summary, scored=True)
    return talk.done()


def ask_notes(rng: Random, notes: Notes, *, unseen: bool = False) -> Conversation:
    """Ask about a text, after it or (as `trimkv ask -f` does) before it; then ask on."""
    talk = Talk(rng, unseen=unseen, facts=list(notes.facts), told=len(notes.facts))
    fact = rng.choice(notes.facts)
    question = fact.ask(rng, unseen=unseen)
    parts = (question, notes.text) if rng.random() < 0.3 else (notes.text, question)
    talk.turn("\n\n".join(parts), fact.answer, scored=True)
    for _ in range(min(2, len(notes.facts))):
        talk.ask()
    return talk.done()


def make_table(rng: Random, *, rows: int = 8, unseen: bool = False) -> Conversation:
    """Write a table of `rows` lines and look some of them up; the answer is the line."""
    keys = draw_words(rng, rows)
    values = [draw_value(rng, rng.choice(("number", "code", "name"))) for _ in keys]
    bar = rng.choice((": ", " | ", " = "))
    lines = [f"{key}{bar}{value}" for key, value in zip(keys, values, strict=True)]
    table = "\n".join([rng.choice(words.TABLE_TITLES), *lines])
    requests = words.UNSEEN_LOOKUPS if unseen else words.LOOKUPS
    asked = rng.sample(range(rows), k=min(rows, 3))
    return _about(rng, table, [(rng.choice(requests).format(k=keys[row]), lines[row]) for row in asked])


def make_steps(rng: Random, *, rows: int = 8, unseen: bool = False) -> Conversation:
    """Write arrows between `rows` words and follow them to the end, one step per line."""
    keys = draw_words(rng, rows)
    leads: dict[str, str] = {}
    rest = list(keys)
    while rest:
        size = rng.randint(2, 5)
        chain, rest = rest[:size], rest[size:]
        leads |= dict(zip(chain, [*chain[1:], "end"], strict=True))
    lines = [f"{here} -> {there}" for here, there in leads.items()]
    rng.shuffle(lines)
    requests = words.UNSEEN_STEPS_REQUESTS if unseen else words.STEPS_REQUESTS
    turns = []
    for start in rng.sample(list(leads), k=min(len(leads), 2)):
        steps, here = [], start
        while here != "end":
            steps.append(f"{here} -> {leads[here]}")
            here = leads[here]
        turns.append((rng.choice(requests).format(k=start), "\n".join(steps)))
    return _about(rng, "\n".join([rng.choice(words.STEPS_TITLES), *lines]), turns)


def make_list(rng: Random, *, rows: int = 8, unseen: bool = False) -> Conversation:
    """Write a list of `rows` words and ask what follows some of them; the answer is both lines."""
    items = draw_words(rng, rows)
    text = "\n".join([rng.choice(words.LIST_TITLES), *(f"- {item}" for item in items)])
    requests = words.UNSEEN_NEXT_REQUESTS if unseen else words.NEXT_REQUESTS
    asked = rng.sample(range(rows - 1), k=min(rows - 1, 3))
    return _about(
        rng, text, [(rng.choice(requests).format(k=items[row]), f"- {items[row]}\n- {items[row + 1]}") for row in asked]
    )


def _about(rng: Random, text: str, turns: Sequence[tuple[str, str]]) -> Conversation:
    """Put a text into the first question, before or after it."""
    talk = Talk(rng)
    (question, answer), *more = turns
    talk.turn(f"{question}\n\n{text}" if rng.random() < 0.2 else f"{text}\n\n{question}", answer, scored=True)
    for question, answer in more:
        talk.turn(question, answer, scored=True)
    return talk.done()
