"""Mistakes that make a table of accuracies lie."""

from __future__ import annotations

import pytest

from bench.points import count_points
from trimkv_cli.eval.scoring import is_right, wilson


@pytest.mark.parametrize("output", ["Boro.", " boro", "BORO .", "Boro\n"])
def test_case_white_space_and_the_final_dot_do_not_count(output: str) -> None:
    """Catches a right answer that is counted as wrong because of its form."""
    assert is_right(output, "Boro.")


@pytest.mark.parametrize("output", ["", "Bor", "Boro Boro", "It is Boro.", "12 March"])
def test_exact_means_the_whole_answer(output: str) -> None:
    """Catches a comparison that lets parts or additions pass."""
    assert not is_right(output, "Boro.")


def test_contains_looks_for_whole_words() -> None:
    """Catches 12 found in 312."""
    assert is_right("Your cat is called **Boro**!", "Boro.", "contains")
    assert is_right("on 12 March, I think", "12 march", "contains")
    assert not is_right("You have 312 apples.", "12", "contains")


def test_lines_count_in_their_order() -> None:
    """Catches steps that are compared as a set."""
    assert is_right("mano\nbelu\nend\n", "mano\nbelu\nend")
    assert not is_right("belu\nmano\nend", "mano\nbelu\nend")


@pytest.mark.parametrize(
    ("right", "count", "expected"),
    [(5, 10, (0.2366, 0.7634)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (95, 100, (0.8882, 0.9785))],
)
def test_wilson_intervals(right: int, count: int, expected: tuple[float, float]) -> None:
    """Catches an interval of the normal approximation, which is empty at 0 % and 100 %."""
    assert wilson(right, count) == pytest.approx(expected, abs=5e-5)


POINTS = ("The door code is 123.", "My cat is called Zubo.", "The exam is on 3 May.")


@pytest.mark.parametrize(
    ("output", "counts"),
    [
        ("- 1: The door code is 123.\n- 2: my cat is called Zubo\n- 3: The exam is on 3 May.", (3, 0)),
        ("* The door code is 123.\n\n1. My cat is called Zubo.", (2, 0)),
        ("- 1: The door code is 123.\n- 2: The door code is 123.", (1, 0)),
        ("- 1: The door code is 124.\n- 3: The exam is on 3 May.", (1, 1)),
        ("The points are these:\n- 3: 3 May", (0, 2)),
        ("", (0, 0)),
    ],
)
def test_points_count_singly(output: str, counts: tuple[int, int]) -> None:
    """Catches a list that is judged as a whole, a point counted twice, and a slip that passes as a point."""
    assert count_points(output, POINTS) == counts
