"""The synthetic language: seeded, and every answer can be read off the text before it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from random import Random

import pytest

from examples.mini import texts
from examples.mini.rows import EARLY, make_conversation
from examples.mini.texts import (
    ask_about,
    make_list,
    make_notes,
    make_story,
    make_table,
    summarize_notes,
)
from trimkv_cli.mini import words
from trimkv_cli.mini.language import (
    Dialogue,
    Talk,
    Telling,
    draw_facts,
    filler,
    filler_sentence,
    make_multi_turn,
    make_recall,
    make_steps,
)

Make = Callable[[Random], Dialogue]
KINDS: dict[str, Make] = {
    "recall": lambda rng: make_recall(rng, facts=6, length=300),
    "multi-turn": lambda rng: make_multi_turn(rng, facts=6, length=300),
    "summary": lambda rng: summarize_notes(rng, make_notes(rng, points=5, length=200)),
    "notes": lambda rng: ask_about(rng, make_notes(rng, points=5, length=200)),
    "story": lambda rng: ask_about(rng, make_story(rng, facts=5, length=200)),
    "story asked about before it": lambda rng: ask_about(rng, make_story(rng), before=1.0),
    "table": make_table,
    "steps": make_steps,
    "list": make_list,
    "table backwards": partial(make_table, reverse=1.0),
    "list backwards": partial(make_list, reverse=1.0),
}


def text_before(conversation: Dialogue, turn: int) -> str:
    return "\n".join(message.content for message in conversation.messages[:turn])


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_one_conversation(kind: str) -> None:
    """Catch a generator that draws from anything but its own stream (a set's order, the global random)."""
    assert KINDS[kind](Random("a")) == KINDS[kind](Random("a"))
    assert KINDS[kind](Random("a")) != KINDS[kind](Random("b"))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_stand_in_the_text(kind: str) -> None:
    """Catch a question whose answer was not told before it."""
    for seed in range(50):
        conversation = KINDS[kind](Random(seed))
        assert conversation.questions
        for question in conversation.questions:
            before = text_before(conversation, question.turn)
            for line in question.answer.splitlines():
                assert line.split()[-1].rstrip(".") in before
            assert conversation.messages[question.turn].content == question.answer
            assert conversation.messages[question.turn - 1].role == "user"


def test_recall_tells_first_and_asks_last() -> None:
    """Catch recall that is easier than it says: facts told late, or asked about half-way."""
    for seed in range(20):
        conversation = make_recall(Random(seed), facts=6, length=500)
        told = [index for index, one in enumerate(conversation.messages) if one.content in words.ACKNOWLEDGEMENTS]
        asked = [question.turn for question in conversation.questions]
        assert len(asked) == 6
        assert asked == list(range(asked[0], asked[0] + 12, 2))
        count = [len(text_before(conversation, turn).split()) for turn in (told[-1], asked[0], asked[-1])]
        assert count[0] < 0.6 * count[1]
        assert 300 < count[2] < 600


def test_unseen_phrasings_are_never_seen() -> None:
    """Catch an examination with the phrasings of the training."""
    for unseen, trained in (
        (words.UNSEEN_LOOKUPS, texts.LOOKUPS),
        (texts.UNSEEN_REVERSE_LOOKUPS, texts.REVERSE_LOOKUPS),
        (texts.UNSEEN_NEXT_REQUESTS, texts.NEXT_REQUESTS),
        (texts.UNSEEN_PREVIOUS_REQUESTS, texts.PREVIOUS_REQUESTS),
    ):
        assert not {*unseen} & {*trained}
    for relation in words.RELATIONS:
        assert not any(statement.startswith(words.OPENERS) for statement in relation.unseen_statements)
        assert not {*relation.unseen_statements} & {*relation.statements, *relation.value_first}
        assert not {*relation.unseen_questions} & {*relation.questions}
    assert not {*texts.UNSEEN_SUMMARY_REQUESTS} & {*texts.SUMMARY_REQUESTS}
    for seed in range(20):
        text = text_before(make_recall(Random(seed), length=60, unseen=True), 99)
        trained = [phrase for relation in words.RELATIONS for phrase in relation.questions if "{t}" not in phrase]
        assert not any(phrase in text for phrase in trained)


def test_marked_points_are_numbered_and_the_summary_holds_just_them() -> None:
    """Catch a summary that misses a point, or a point that nobody marked."""
    for seed in range(20):
        notes = make_notes(Random(seed), points=7, length=150)
        marked = [line for line in notes.text.splitlines() if line.split(" ")[0] in texts.MARKS and ": " in line]
        assert [line.split(" ", 1)[1] for line in marked] == [line[2:] for line in notes.summary.splitlines()]
        assert len(notes.points) == 7


def test_loose_points_tell_nothing_that_is_asked_for() -> None:
    """Catch a question about a fact whose point was replaced, and notes about which nothing can be asked."""
    for seed in range(20):
        notes = make_notes(Random(seed), points=7, length=150, loose=0.5)
        assert 1 <= len(notes.facts) <= 7
        assert all(any(fact.value in point for point in notes.points) for fact in notes.facts)
        assert all(point in notes.text for point in notes.points)
        assert notes.summary.count("\n") == 6


def test_shuffled_points_have_a_facts_words_and_tell_nothing_that_is_asked_for() -> None:
    """Catch a question about a fact whose words stand in any order, and points that keep theirs."""
    plain, mixed = (make_notes(Random(3), points=7, length=150, shuffle=shuffle) for shuffle in (0.0, 1.0))
    assert len(plain.facts) == 7
    assert len(mixed.facts) == 1
    kept = [index for index, fact in enumerate(plain.facts) if fact.thing == mixed.facts[0].thing]
    assert [mixed.points[index] for index in kept] == [plain.points[index] for index in kept]
    for before, after in zip(plain.points, mixed.points, strict=True):
        assert sorted(before.lower().rstrip(".").split()) == sorted(after.lower().rstrip(".").split())
    assert sum(before != after for before, after in zip(plain.points, mixed.points, strict=True)) >= 5


def test_anagrams_have_the_words_of_one_point() -> None:
    """Catch notes whose points are told apart by their words, where numbers should."""
    notes = make_notes(Random(3), points=7, length=150, anagrams=True)
    first, *others = [sorted(point.lower().rstrip(".").split()) for point in notes.points]
    assert all(other == first for other in others)
    assert len(set(notes.points)) > 4
    assert len(notes.facts) == 1
    assert notes.facts[0].value in notes.points[0]


def test_a_story_tells_all_its_facts_and_may_be_asked_about_before_it() -> None:
    """Catch a story that lost a fact, and questions that stand where they were not wanted."""
    for seed in range(20):
        story = make_story(Random(seed), facts=5, length=120)
        assert all(fact.thing in story.text and fact.value in story.text for fact in story.facts)
        assert 120 <= len(story.text.split()) < 140
        for before, place in ((1.0, 0), (0.0, 1)):
            first = ask_about(Random(seed), story, before=before).messages[0].content
            assert first.split("\n\n")[1 - place] == story.text
            assert first.split("\n\n")[place] != story.text


def test_arrows_end_and_every_step_is_a_line_of_the_table() -> None:
    """Catch a chain that runs in a circle or skips a step."""
    for seed in range(20):
        conversation = make_steps(Random(seed), rows=12)
        table = conversation.messages[0].content
        for question in conversation.questions:
            steps = question.answer.splitlines()
            assert steps[-1].endswith(" -> end")
            assert all(step in table.splitlines() for step in steps)
            assert all(here.split()[2] == there.split()[0] for here, there in pairwise(steps))


@pytest.mark.parametrize("make", [make_table, make_list])
def test_backwards_the_question_names_what_stands_last(make: Callable[..., Dialogue]) -> None:
    """Catch a training that only ever looks forward, and an examination that changes with it."""
    for seed in range(20):
        for reverse, place in ((0.0, 0), (1.0, -1)):
            conversation = make(Random(seed), rows=8, reverse=reverse)
            for question in conversation.questions:
                asked = conversation.messages[question.turn - 1].content.splitlines()
                lines = question.answer.replace("- ", "").replace("\n", " ").split()
                once = conversation.messages[0].content.split().count(lines[-1]) == 1  # a value of two keys names none
                named = lines[place if once else 0].rstrip(":")
                assert any(named in line.rstrip("?.").split() for line in (asked[0], asked[-1]))


def test_alike_facts_are_of_one_kind() -> None:
    """Catch facts that their kind tells apart where their things should."""
    for seed in range(50):
        facts = draw_facts(Random(seed), 6, alike=True)
        assert len({fact.relation for fact in facts}) == 1
        assert len({fact.thing for fact in facts}) == 6


def test_things_are_told_once() -> None:
    """Catch two facts about one thing, which have no one answer."""
    for seed in range(100):
        conversation = make_multi_turn(Random(seed), facts=12, length=400)
        answers: dict[str, str] = {}
        for question in conversation.questions:
            asked = conversation.messages[question.turn - 1].content
            assert answers.setdefault(asked, question.answer) == question.answer


def test_values_come_first_only_where_training_asks_for_it() -> None:
    """Catch an evaluation that changes with the training's mixture, and a training without what is hardest."""
    for seed in range(20):
        fact = draw_facts(Random(seed), 1)[0]
        assert fact.tell(Random(seed)) in {s.format(t=fact.thing, v=fact.value) for s in fact.relation.statements}
        told = fact.tell(Random(seed), telling=Telling(value_first=1.0))
        assert fact.value in told
        if len(fact.relation.things) > 1:
            assert told.index(fact.value) < told.rindex(fact.thing)


def test_openers_come_first_and_are_never_those_of_unseen_phrasings() -> None:
    """Catch a training that is told the examination's openers, or none but its own few."""
    listed = 0
    for seed in range(200):
        fact = draw_facts(Random(seed), 1)[0]
        said = {s.format(t=fact.thing, v=fact.value)[1:] for s in fact.relation.statements}
        opener, end = next(
            (told[: -len(end)], end)
            for told in [fact.tell(Random(seed), telling=Telling(openers=1.0, loose_openers=0.5))]
            for end in sorted(said, key=len, reverse=True)
            if told.endswith(end)
        )
        assert 1 <= len(opener.split()) <= 5, (opener, end)
        assert not opener.startswith("You know")
        listed += opener.startswith(words.OPENERS)
        assert fact.tell(Random(seed), telling=Telling(openers=1.0)).startswith(words.OPENERS)
    assert 60 < listed < 140


def test_fresh_questions_go_to_facts_not_asked_for_yet() -> None:
    """Catch a training where most answers can be copied from an answer given before."""
    for seed in range(20):
        talk = Talk(Random(seed), facts=draw_facts(Random(seed), 6), told=6, fresh=1.0)
        for _ in range(6):
            talk.ask()
        assert len({question.answer for question in talk.done().questions}) == 6
        talk.ask()


def test_the_share_of_strange_filler_is_the_one_asked_for() -> None:
    """Catch filler that stays tame where gates are to learn what must not be kept."""
    known = {word for sentence in filler(Random(0), 3000, strange=0.0).split(".") for word in sentence.lower().split()}
    for share in (0.08, 0.4):
        rng = Random(1)
        sentences = [filler_sentence(rng, strange=share) for _ in range(2000)]
        strange = sum(not known.issuperset(sentence.lower().rstrip(".").split()) for sentence in sentences)
        assert strange / len(sentences) == pytest.approx(share, abs=0.03)


def test_a_mixtures_strange_filler_is_in_its_notes_and_in_its_talk() -> None:
    """Catch a mixture whose share of strange filler reaches only a part of its conversations."""
    mixture = replace(EARLY, pairs=0.0, summaries=1.0, tasks=0.0, points=1)
    for share, least, most in ((0.0, 0, 0), (0.6, 4, 200)):
        notes, _, *talk = make_conversation(Random(3), 2000, replace(mixture, strange=share)).messages
        for text in (notes.content, " ".join(message.content for message in talk)):
            assert least <= len(re.findall(r"\d (?:birds|ships|clouds|trees)", text)) <= most


def test_notes_are_as_long_as_a_mixture_asks_for() -> None:
    """Catch lists whose notes are short, whatever the gates are to learn of long ones."""
    mixture = replace(EARLY, pairs=0.0, summaries=1.0, tasks=0.0, points=4)
    for share in (0.3, 0.9):
        notes, *_ = make_conversation(Random(5), 1000, replace(mixture, reading=(share, share))).messages
        assert len(notes.content.split()) == pytest.approx(1000 * share, abs=40)
