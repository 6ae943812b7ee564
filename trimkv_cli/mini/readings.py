"""Texts to read and to be asked about: stories, notes with marked points, tables, arrows and lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from trimkv_cli.mini import words
from trimkv_cli.mini.language import (
    PLAIN,
    STRANGE,
    Conversation,
    Fact,
    Talk,
    Telling,
    draw_facts,
    draw_value,
    draw_words,
    filler,
    filler_sentence,
    loose_sentence,
    shuffled,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """A text, and the facts that it tells."""

    text: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notes(Story):
    """A text of filler lines with marked points: "Note 3: …". `facts` are those that points tell."""

    points: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The points as a list, one per line."""
        return "\n".join(f"- {number}: {point}" for number, point in enumerate(self.points, start=1))


def make_story(
    rng: Random,
    *,
    facts: int = 4,
    length: int = 60,
    unseen: bool = False,
    telling: Telling = PLAIN,
    numbers: float = 1.0,
    alike: bool = False,
    strange: float = STRANGE,
) -> Story:
    """Write about `length` words, with `facts` facts told anywhere among filler, in lines of one to three sentences."""
    drawn = draw_facts(rng, facts, numbers=numbers, alike=alike)
    sentences = [fact.tell(rng, unseen=unseen, telling=telling) for fact in drawn]
    count = sum(len(sentence.split()) for sentence in sentences)
    while count < length:
        sentences.append(filler_sentence(rng, strange=strange))
        count += len(sentences[-1].split())
    rng.shuffle(sentences)
    lines: list[str] = []
    while sentences:
        size = rng.randint(1, 3)
        lines.append(" ".join(sentences[:size]))
        sentences = sentences[size:]
    return Story(text="\n".join(lines), facts=tuple(drawn))


def make_notes(
    rng: Random,
    *,
    points: int = 6,
    length: int = 300,
    unseen: bool = False,
    telling: Telling = PLAIN,
    numbers: float = 1.0,
    alike: bool = False,
    loose: float = 0.0,
    shuffle: float = 0.0,
    anagrams: bool = False,
    strange: float = STRANGE,
) -> Notes:
    """Write about `length` words of filler lines, with `points` (at least one) marked points spread over them.

    Facts may be `alike`, of one kind. One point, drawn at random, always tells a fact. The share `loose` of the rest
    tells none: words in any order, to be copied as they stand. So does the share `shuffle` of what is left, whose words
    are those of a fact; of `anagrams` all that is left, whose words are those of the one fact, so that only numbers
    tell them apart.
    """
    facts = draw_facts(rng, points, numbers=numbers, alike=alike)
    told = [fact.tell(rng, unseen=unseen, telling=telling) for fact in facts]
    spared = rng.randrange(points) if loose or shuffle or anagrams else 0
    rest = [index for index in range(points) if index != spared]
    others = [index for index in rest if loose and rng.random() < loose]
    for index in others:
        told[index] = loose_sentence(rng)
    shuffle = 1.0 if anagrams else shuffle
    mixed = [index for index in rest if shuffle and index not in others and rng.random() < shuffle]
    for index in mixed:
        told[index] = shuffled(rng, told[spared if anagrams else index])
    mark = rng.choice(words.MARKS)
    lines: list[str] = []
    count = sum(len(point.split()) + 2 for point in told)
    while count < length:
        lines.append(filler(rng, rng.randint(1, 3), strange=strange))
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


def ask_about(rng: Random, story: Story, *, unseen: bool = False, before: float = 0.3) -> Conversation:
    """Ask about a text, the share `before` in front of it, as `trimkv ask -f` does; then ask on."""
    talk = Talk(rng, unseen=unseen, facts=list(story.facts), told=len(story.facts))
    fact = rng.choice(story.facts)
    question = fact.ask(rng, unseen=unseen)
    parts = (question, story.text) if rng.random() < before else (story.text, question)
    talk.turn("\n\n".join(parts), fact.answer, scored=True)
    for _ in range(min(2, len(story.facts))):
        talk.ask()
    return talk.done()


def make_table(rng: Random, *, rows: int = 8, unseen: bool = False, reverse: float = 0.0) -> Conversation:
    """Write a table of `rows` lines and look some of them up; the answer is the line.

    The share `reverse` of questions names the value and wants the line that has it.
    """
    keys = draw_words(rng, rows)
    values = [draw_value(rng, rng.choice(("number", "code", "name"))) for _ in keys]
    bar = rng.choice((": ", " | ", " = "))
    lines = [f"{key}{bar}{value}" for key, value in zip(keys, values, strict=True)]
    table = "\n".join([rng.choice(words.TABLE_TITLES), *lines])
    forward = words.UNSEEN_LOOKUPS if unseen else words.LOOKUPS
    backward = words.UNSEEN_REVERSE_LOOKUPS if unseen else words.REVERSE_LOOKUPS
    turns = []
    for row in rng.sample(range(rows), k=min(rows, 3)):
        back = reverse and values.count(values[row]) == 1 and rng.random() < reverse
        question = rng.choice(backward if back else forward).format(k=keys[row], v=values[row])
        turns.append((question, lines[row]))
    return _about(rng, table, turns)


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


def make_list(rng: Random, *, rows: int = 8, unseen: bool = False, reverse: float = 0.0) -> Conversation:
    """Write a list of `rows` words and ask what follows some of them; the answer is both lines.

    The share `reverse` of questions asks what comes before.
    """
    items = draw_words(rng, rows)
    text = "\n".join([rng.choice(words.LIST_TITLES), *(f"- {item}" for item in items)])
    forward = words.UNSEEN_NEXT_REQUESTS if unseen else words.NEXT_REQUESTS
    backward = words.UNSEEN_PREVIOUS_REQUESTS if unseen else words.PREVIOUS_REQUESTS
    turns = []
    for row in rng.sample(range(rows - 1), k=min(rows - 1, 3)):
        back = reverse and rng.random() < reverse
        question = rng.choice(backward if back else forward).format(k=items[row + 1 if back else row])
        turns.append((question, f"- {items[row]}\n- {items[row + 1]}"))
    return _about(rng, text, turns)


def _about(rng: Random, text: str, turns: Sequence[tuple[str, str]]) -> Conversation:
    """Put a text into the first question, before or after it."""
    talk = Talk(rng)
    (question, answer), *more = turns
    talk.turn(f"{question}\n\n{text}" if rng.random() < 0.2 else f"{text}\n\n{question}", answer, scored=True)
    for question, answer in more:
        talk.turn(question, answer, scored=True)
    return talk.done()
