"""Questions for kvpress's presses, and what is written of their answers; kvpress itself is not needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import kvpress_answers
from bench.kvpress_answers import Case, Question, by_document, make_cases, ratio, read_questions, run, until
from trimkv_cli.eval.samples import read_answers


def exported(number: int, document: tuple[int, ...]) -> dict[str, Any]:
    ids = [*document, 90 + number, 99]
    return {"id": f"q{number}", "prompt_token_ids": ids, "document_len": len(document), "max_tokens": 8, "stop": ["\n"]}


def test_a_press_keeps_just_as_many_tokens_as_asked_for() -> None:
    """Catches a ratio that floating point rounds to one token less than M."""
    for tokens in range(65, 1400, 13):
        for kept in range(1, tokens):
            assert int(tokens * (1 - ratio(tokens, kept))) == kept  # as kvpress rounds


def test_what_is_asked_about_one_document_is_pressed_once() -> None:
    """Catches documents told apart by their questions, and two that are taken for one as they are equally long."""
    lines = [exported(0, (1, 2, 3)), exported(1, (1, 2, 4)), exported(2, (1, 2, 3))]
    groups = by_document(read_questions(lines))
    assert [[question.id for question in group] for group in groups] == [["q0", "q2"], ["q1"]]
    assert groups[0][1].document + groups[0][1].asked == (1, 2, 3, 92, 99)


@pytest.mark.parametrize(
    ("line", "said"),
    [({"id": "q", "output": ""}, "q says no prompt_token_ids"), (exported(0, ()), "q0 has no document")],
)
def test_questions_that_cannot_be_pressed_are_named(line: dict[str, Any], said: str) -> None:
    """Catches an older export that ends in a traceback, and a summary whose whole prompt would be the question."""
    with pytest.raises(SystemExit, match=said):
        read_questions([line])


def test_a_full_cache_is_asked_once() -> None:
    """Catches a full cache per budget, which would be two rows of one table."""
    assert make_cases(["full", "tova"], [8, 16]) == [
        Case(press="full", kv_budget=None), Case(press="tova", kv_budget=8), Case(press="tova", kv_budget=16)
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="no press tovva"):
        make_cases(["tovva"], [8])


def test_an_answer_ends_at_the_first_of_its_stops() -> None:
    """Catches the text after an answer that trimkv would not have said."""
    assert until("a b\nc. d", ["\n", "."]) == "a b"
    assert until("a b", []) == "a b"


def test_a_stopped_run_goes_on_and_trimkv_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a question that is answered twice after a stop, which `--answers` refuses, or never."""

    def answer(pipe: object, group: Sequence[Question], case: Case) -> Iterator[dict[str, Any]]:
        for question in group:
            yield {"id": question.id, "output": "so", "policy": case.policy, "kv_budget": case.kv_budget}

    monkeypatch.setattr(kvpress_answers, "answer", answer)
    questions = read_questions([exported(0, (1, 2, 3)), exported(1, (1, 2, 4)), exported(2, (1, 2, 3))])
    out, common = tmp_path / "said.jsonl", {"model": "tiny"}
    first = {"id": "q0", "output": "it is", "policy": "kvpress-tova", "kv_budget": 8, **common}
    out.write_text(json.dumps(first) + "\n")
    run(None, questions, make_cases(["full", "tova"], [8]), out, common)
    tables = {(table.policy, table.kv_budget): dict(table.said) for table in read_answers(str(out))}
    assert tables == {
        ("kvpress-full", None): {"q0": "so", "q1": "so", "q2": "so"},
        ("kvpress-tova", 8): {"q0": "it is", "q1": "so", "q2": "so"},
    }
    with pytest.raises(SystemExit, match="has answers with model tiny, not large"):
        run(None, questions, make_cases(["full"], []), out, {"model": "large"})
