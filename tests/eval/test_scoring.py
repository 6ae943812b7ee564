"""Mistakes that make a table of accuracies lie."""

from __future__ import annotations

import re

import pytest

from bench.points import count_points
from trimkv_cli.eval.scoring import EvalResult, is_right, wilson
from trimkv_cli.ui.accuracy import accuracy_plot, accuracy_report


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


def _row(**changes: object) -> EvalResult:
    given = {"task": "ppl", "policy": "full", "kv_budget": None, "accuracy": None, "n": 9, "ci95": (2.9, 3.1)}
    none = {"answer_logprob": None, "decode_tps": 0.0, "peak_bytes": 0, "kv_bytes": 0, "prefill_chunk": 32}
    return EvalResult(**(given | none | {"context": 10, "prompt_tokens": 10.0, "seed": 0} | changes))  # type: ignore[arg-type]


def test_perplexity_is_drawn_between_its_best_and_its_worst() -> None:
    """Catches perplexities drawn as if they were shares, and one alone that divides by zero."""
    full, small = _row(nats=3.0, ratio=1.0), _row(policy="streaming", kv_budget=64, nats=4.0, ratio=2.718)
    right = _row(task="needle", accuracy=0.5, ci95=(0.4, 0.6))
    report = accuracy_report([full, small, right])
    assert "ppl 20.09 ×1.000" in report
    assert "  50% |   F" in report
    ppl = accuracy_plot("ppl", [full, small]).split("\n")
    assert ppl[0] == "ppl: perplexity against M   F full  S streaming"
    assert [line.split() for line in (ppl[1], ppl[11])] == [["54.6", "|", "S"], ["20.1", "|", "F"]]
    assert "20.1 |   F" in accuracy_plot("ppl", [full])


def test_a_score_without_an_interval_is_shown_without_one() -> None:
    """Catches a table that fails, or makes one up, where a single document was asked about."""
    report = accuracy_report([_row(task="summary-recall", accuracy=0.375, ci95=None), _row(nats=3.0, ci95=None)])
    assert re.search(r"full +all +37\.5% +– +9", report)
    assert re.search(r"full +all +ppl 20\.09 +– +9", report)
