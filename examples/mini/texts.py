"""Texts to read and to be asked about: stories, notes with marked points, tables and lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from trimkv_cli.mini import words
from trimkv_cli.mini.language import (
    PLAIN,
    STRANGE,
    Dialogue,
    Fact,
    Talk,
    Telling,
    draw_facts,
    draw_value,
    draw_word,
    draw_words,
    filler,
    filler_sentence,
    open_with,
)

# fmt: off
MARKS = ("Note", "NOTE", "Important", "Point")
TITLES = ("Notes of the week", "Diary", "Report", "Minutes of the meeting", "A letter home", "My notes")
SUMMARY_REQUESTS = (
    # The first one is what `trimkv summarize` sends.
    "Summarize the text above. Keep to what it says; list its main points.",
    "Summarize the text above. Keep to what it says; list its main points.",
    "Summarize the text above.",
    "List the marked points.",
    "List the main points.",
    "List the notes.",
)
UNSEEN_SUMMARY_REQUESTS = ("List the main points of the text above.", "List its marked points.")

LOOKUPS = (
    "What stands beside {k}?", "What is the value of {k}?", "Look up {k}.", "What does the table say about {k}?",
    "How much is {k}?",
)
REVERSE_LOOKUPS = (
    "Which one has {v}?", "What stands before {v}?", "Which line says {v}?", "Look for {v}.", "What has the value {v}?",
)
UNSEEN_REVERSE_LOOKUPS = ("Which line has {v}?", "Tell me which one says {v}.")
LIST_TITLES = ("Here is a list:", "List:", "My list:", "Look at this list:")
NEXT_REQUESTS = ("What comes after {k}?", "Which one follows {k}?", "Which one is next after {k}?")
UNSEEN_NEXT_REQUESTS = ("Which one comes after {k}?",)
PREVIOUS_REQUESTS = ("What comes before {k}?", "Which one precedes {k}?", "Which one is just before {k}?")
UNSEEN_PREVIOUS_REQUESTS = ("Which one comes before {k}?",)
# fmt: on


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
    mark = rng.choice(MARKS)
    lines: list[str] = []
    count = sum(len(point.split()) + 2 for point in told)
    while count < length:
        lines.append(filler(rng, rng.randint(1, 3), strange=strange))
        count += len(lines[-1].split())
    places = sorted(rng.randrange(len(lines) + 1) for _ in told)
    for index in reversed(range(points)):
        lines.insert(places[index], f"{mark} {index + 1}: {told[index]}")
    if rng.random() < 0.5:
        lines.insert(0, rng.choice(TITLES))
    kept = (fact for index, fact in enumerate(facts) if index not in (*others, *mixed))
    return Notes(text="\n".join(lines), points=tuple(told), facts=tuple(kept))


def summarize_notes(rng: Random, notes: Notes, *, unseen: bool = False) -> Dialogue:
    """Ask for the marked points of a text, in the form in which `trimkv summarize` does."""
    talk = Talk(rng, unseen=unseen)
    request = rng.choice(UNSEEN_SUMMARY_REQUESTS if unseen else SUMMARY_REQUESTS)
    talk.turn(f"{notes.text}\n\n{request}", notes.summary, scored=True)
    return talk.done()


def ask_about(rng: Random, story: Story, *, unseen: bool = False, before: float = 0.3) -> Dialogue:
    """Ask about a text, the share `before` in front of it, as `trimkv ask -f` does; then ask on."""
    talk = Talk(rng, unseen=unseen, facts=list(story.facts), told=len(story.facts))
    fact = rng.choice(story.facts)
    question = fact.ask(rng, unseen=unseen)
    parts = (question, story.text) if rng.random() < before else (story.text, question)
    talk.turn("\n\n".join(parts), fact.answer, scored=True)
    for _ in range(min(2, len(story.facts))):
        talk.ask()
    return talk.done()


def make_table(rng: Random, *, rows: int = 8, unseen: bool = False, reverse: float = 0.0) -> Dialogue:
    """Write a table of `rows` lines and look some of them up; the answer is the line.

    The share `reverse` of questions names the value and wants the line that has it.
    """
    keys = draw_words(rng, rows)
    values = [draw_value(rng, rng.choice(("number", "code", "name"))) for _ in keys]
    bar = rng.choice((": ", " | ", " = "))
    lines = [f"{key}{bar}{value}" for key, value in zip(keys, values, strict=True)]
    table = "\n".join([rng.choice(words.TABLE_TITLES), *lines])
    forward = words.UNSEEN_LOOKUPS if unseen else LOOKUPS
    backward = UNSEEN_REVERSE_LOOKUPS if unseen else REVERSE_LOOKUPS
    turns = []
    for row in rng.sample(range(rows), k=min(rows, 3)):
        back = reverse and values.count(values[row]) == 1 and rng.random() < reverse
        question = rng.choice(backward if back else forward).format(k=keys[row], v=values[row])
        turns.append((question, lines[row]))
    return open_with(rng, table, turns)


def make_list(rng: Random, *, rows: int = 8, unseen: bool = False, reverse: float = 0.0) -> Dialogue:
    """Write a list of `rows` words and ask what follows some of them; the answer is both lines.

    The share `reverse` of questions asks what comes before.
    """
    items = draw_words(rng, rows)
    text = "\n".join([rng.choice(LIST_TITLES), *(f"- {item}" for item in items)])
    forward = UNSEEN_NEXT_REQUESTS if unseen else NEXT_REQUESTS
    backward = UNSEEN_PREVIOUS_REQUESTS if unseen else PREVIOUS_REQUESTS
    turns = []
    for row in rng.sample(range(rows - 1), k=min(rows - 1, 3)):
        back = reverse and rng.random() < reverse
        question = rng.choice(backward if back else forward).format(k=items[row + 1 if back else row])
        turns.append((question, f"- {items[row]}\n- {items[row + 1]}"))
    return open_with(rng, text, turns)


def loose_sentence(rng: Random) -> str:
    """Write four to nine words in any order, strange ones among them: a sentence that only copying can repeat."""
    known = f"{filler_sentence(rng)} {filler_sentence(rng)}".lower().replace(".", "").split()
    drawn = [_loose_word(rng, known) for _ in range(rng.randint(4, 9))]
    return f"{' '.join(drawn).capitalize()}."


def _loose_word(rng: Random, known: Sequence[str]) -> str:
    draw = rng.random()
    if draw < 0.3:
        return draw_word(rng)
    return rng.choice(words.COMMON if draw < 0.65 else known)


def shuffled(rng: Random, sentence: str) -> str:
    """Put the words of a sentence in any order: what usually follows what then says nothing."""
    drawn = sentence.rstrip(".").split()
    rng.shuffle(drawn)
    return f"{' '.join(drawn).capitalize()}."
