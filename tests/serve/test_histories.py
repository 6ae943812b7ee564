"""Mistakes in recognising a conversation by what a client sends of it, and in what is forgotten first."""

from __future__ import annotations

from typing import Any

import pytest

from trimkv_cli.serve.histories import Histories, History

HOW = (None,)


class Aside:
    """A row put aside, as far as histories look at it."""

    nbytes = 100


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def history(name: str, *messages: dict[str, Any], answer: str = "fine", **more: Any) -> History:
    return History(id=name, fed=(1, 2), messages=messages, how=HOW, answer=said(answer), **more)


def found(histories: Histories, *messages: dict[str, Any], how: object = HOW) -> str | None:
    hit = histories.find(messages, how)
    return None if hit is None else hit.id


def holding(*held: History, most_aside: int = 2) -> Histories:
    histories = Histories(most_aside)
    for each in held:
        histories.keep(each)
    return histories


@pytest.mark.parametrize(
    ("answer", "sent"),
    [
        ("fine", "fine"),
        (" fine \n", "fine"),
        ("fine", "fine\n"),
        ("<think>\nhm\n</think>\n\nfine", "fine"),
        ("<think>\nhm\n</think>\n\nfine", "<think>\nhm\n</think>\n\nfine"),
        ("hm</think>fine", "fine"),
        ("", ""),
        ("  ", ""),
        ("<think>cut in the mid", "<think>cut in the mid"),
    ],
)
def test_an_answer_is_known_without_its_reasoning_and_blanks(answer: str, sent: str) -> None:
    """Catch a conversation that is read anew since a client dropped what readers do not see."""
    histories = holding(history("a", user("hi"), answer=answer))
    assert found(histories, user("hi"), said(sent), user("more")) == "a"


@pytest.mark.parametrize(
    "messages",
    [
        (user("hi"), said("Fine"), user("more")),  # edited
        (user("hi "), said("fine"), user("more")),  # a user's blanks are meant
        (user("hi"), said(""), user("more")),
        (user("hi"), user("fine"), user("more")),
        (user("hi"), said("fine")),  # nothing to answer
        (user("hi"),),
        (),
        ({**user("hi"), "name": "Ann"}, said("fine"), user("more")),
        (user("before"), user("hi"), said("fine"), user("more")),
    ],
)
def test_another_conversation_is_not_taken_for_it(messages: tuple[dict[str, Any], ...]) -> None:
    """Catch an answer to something that was never said."""
    assert found(holding(history("a", user("hi"))), *messages) is None


def test_reasoning_without_an_answer_is_not_known_by_nothing() -> None:
    """Catch an empty answer of another conversation that is taken for one whose reasoning was cut."""
    histories = holding(history("a", user("hi"), answer="<think>hm"))
    assert found(histories, user("hi"), said(""), user("more")) is None


def test_how_a_conversation_is_rendered_is_part_of_it() -> None:
    """Catch a row that was read with another template's options."""
    histories = holding(history("a", user("hi")))
    assert found(histories, user("hi"), said("fine"), user("more"), how=(True,)) is None


def test_the_longest_beginning_counts() -> None:
    """Catch a turn that is read again although a row holds it."""
    longer = history("b", user("hi"), said("fine"), user("more"), answer="well")
    histories = holding(longer, history("a", user("hi")))
    assert found(histories, user("hi"), said("fine"), user("more"), said("well"), user("x")) == "b"
    assert found(histories, user("hi"), said("fine"), user("other")) == "a"


def test_a_prompt_is_known_by_its_tokens_and_goes_on() -> None:
    """Catch a prompt that has nothing new to feed, or another beginning."""
    held = [History(id=str(fed), fed=fed) for fed in ((1,), (1, 2, 3), (1, 2))]
    histories = holding(*held)
    hits = [histories.find_tokens(ids) for ids in ((1, 2, 3, 4), (1, 2, 3), (1,), (2, 1))]
    assert [hit and hit.fed for hit in hits] == [(1, 2, 3), (1, 2), None, None]
    assert found(histories, user("hi"), said("fine"), user("more")) is None


def test_the_one_used_longest_ago_is_forgotten() -> None:
    """Catch memory that grows with the number of conversations, and a popular one that is forgotten."""
    held = {name: history(name, user(name)) for name in "abcd"}
    histories = holding(*held.values())
    for name in "abc":
        oldest = histories.oldest_in_row()
        assert oldest is held[name]
        histories.put_aside(oldest, Aside)  # type: ignore[arg-type]
    assert (len(histories), histories.nbytes) == (3, 200)
    assert [found(histories, user(name), said("fine"), user("x")) for name in "abcd"] == [None, "b", "c", "d"]
    histories.clear()
    assert len(histories) == 0


def test_the_one_that_goes_on_is_not_forgotten_nor_counted() -> None:
    """Catch a conversation that is forgotten as its next turn comes, and the next one since the two change places."""
    held = {name: history(name, user(name)) for name in "abcd"}
    histories = holding(*held.values())
    for name in "ab":
        histories.put_aside(held[name], Aside)  # type: ignore[arg-type]
    histories.put_aside(held["c"], Aside, but=held["a"])  # type: ignore[arg-type]
    assert [found(histories, user(name), said("fine"), user("x")) for name in "abcd"] == ["a", "b", "c", "d"]
    held["a"].state = None  # it has its row
    assert histories.nbytes == 200
    histories.put_aside(held["d"], Aside, but=None)  # type: ignore[arg-type]
    assert [found(histories, user(name), said("fine"), user("x")) for name in "abcd"] == ["a", None, "c", "d"]


def test_room_is_made_before_another_is_copied() -> None:
    """Catch a copy more than the plan counts, if only for a moment."""
    held = {name: history(name, user(name)) for name in "abc"}
    histories = holding(*held.values())
    seen = []

    def save() -> Aside:
        seen.append(histories.nbytes)
        return Aside()

    for name in "abc":
        histories.put_aside(held[name], save)  # type: ignore[arg-type]
    assert seen == [0, 100, 100]


def test_with_nothing_kept_aside_rows_still_go_on() -> None:
    """Catch `--kept 0` that keeps one all the same, or fails."""
    histories = holding(history("a", user("hi")), most_aside=0)
    assert found(histories, user("hi"), said("fine"), user("x")) == "a"
    oldest = histories.oldest_in_row()
    assert oldest is not None
    histories.put_aside(oldest, Aside)  # type: ignore[arg-type]
    assert len(histories) == 0
