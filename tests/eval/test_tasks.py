"""Mistakes of the generated questions: another text each time, an answer that nothing tells, a wrong length."""

from __future__ import annotations

import pytest

from trimkv_cli.eval.mini_tasks import MINI_TASKS, draw_mini
from trimkv_cli.eval.samples import Sample


def _measure(case: Sample) -> int:
    return sum(2 * len(message["content"].split()) + 4 for message in case.messages)


def _cases(task: str, *, count: int = 8, seed: int = 7, tokens: int = 600) -> list[Sample]:
    return draw_mini(task, count=count, tokens=tokens, seed=seed, measure=_measure)


@pytest.mark.parametrize("task", MINI_TASKS)
def test_a_seed_fixes_the_questions(task: str) -> None:
    """Catches questions that depend on anything but task, seed and number."""
    assert _cases(task) == _cases(task)
    assert _cases(task, count=3) == _cases(task)[:3]
    assert not set(map(repr, _cases(task))) & set(map(repr, _cases(task, seed=8)))


@pytest.mark.parametrize("task", MINI_TASKS)
def test_the_answer_is_in_the_text(task: str) -> None:
    """Catches a question that nobody could answer."""
    for case in _cases(task):
        told = "\n".join(message["content"] for message in case.messages[:-1]).split()
        told += case.messages[-1]["content"].split()
        assert case.value or task == "procedure"
        assert case.value in case.answer
        for word in (case.value or case.answer).split():
            assert any(word in one for one in told)
        assert case.messages[-1]["role"] == "user"


@pytest.mark.parametrize("task", MINI_TASKS)
def test_conversations_have_the_wanted_length(task: str) -> None:
    """Catches a context that is counted in words, or not at all."""
    lengths = [_measure(case) for case in _cases(task, count=30)]
    if task == "mini-multi-turn":  # asked all along
        assert max(lengths) <= 600 * 1.2
        assert min(lengths) < 300
    else:
        assert sum(lengths) / len(lengths) == pytest.approx(600, rel=0.1)


def test_a_short_context_still_holds_a_question() -> None:
    """Catches an endless search for a conversation that is long enough to hold a question."""
    assert all(len(_cases(task, tokens=10, count=2)) == 2 for task in MINI_TASKS)
