"""The recipe of SmolLM2's gates: what is told can be asked, and nothing of an evaluation is learned from."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from examples.gates.smollm2.conversations import LONGER, conversations, merged
from examples.gates.smollm2.facts import RELATIONS, draw_facts
from examples.gates.smollm2.own_answers import join
from examples.gates.smollm2.texts import PACKAGES
from trimkv_cli.eval.facts import TOPICS
from trimkv_cli.train.documents import DataFiles

PARAGRAPHS = [
    f"This is paragraph {n} of a text that nobody wrote. It goes on for a while; then it ends." for n in range(40)
]


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Return a folder where all packages lie, so that none is fetched."""
    for package, pattern in PACKAGES.items():
        path = tmp_path / package / pattern.replace("**/", "").replace("*", "text")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".dz":
            tags = ("<p>", "</p>") if path.suffix == ".html" else ("", "")
            path.write_text("\n\n".join(f"{tags[0]}{text}{tags[1]}" for text in PARAGRAPHS))
        else:
            path.with_suffix("").write_text("")
    return tmp_path


def test_what_is_asked_was_told(packages: Path, tmp_path: Path) -> None:
    """Catches answers that no text holds, two messages of one role in a row, and lines that training refuses."""
    found = list(conversations(packages, count=60, seed=3, lengths=LONGER))
    for messages in found:
        roles = [message["role"] for message in messages if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    again = list(conversations(packages, count=60, seed=3, lengths=LONGER))
    assert found == again
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in found))
    assert len(DataFiles([data]).places) == 60


def test_every_fact_says_its_value() -> None:
    """Catches a wording without its value, or a question that gives it away."""
    rng = Random(0)
    for _ in range(300):
        for fact in draw_facts(rng, 5):
            assert fact.value.lower() in fact.tell(rng).lower()
            assert fact.value.lower() in fact.answer(rng).lower()
            assert fact.subject.lower() in fact.ask(rng).lower()


def test_no_wording_of_an_evaluation_is_learned_from() -> None:
    """Catches gates that are asked what they were trained on."""
    learned = {wording for relation in RELATIONS for wording in (*relation.told, *relation.asked)}
    held_out = {wording for topic in TOPICS for wording in (*topic.told, *topic.asked)}
    plain = {wording.replace("{s}", "").replace("{v}", "").strip(" .?").lower() for wording in learned}
    assert not plain & {wording.replace("{v}", "").strip(" .?").lower() for wording in held_out}


def test_a_text_and_its_first_question_are_one_message() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    joined = merged(Random(0), messages)
    assert [message["role"] for message in joined] == ["user", "assistant"]
    assert joined[0]["content"].startswith("a\n\n")
    assert joined[0]["content"].endswith("b")


def test_own_answers_are_those_that_came(tmp_path: Path) -> None:
    """Catches an answer put to another's question, and lines that failed."""
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    asked.write_text(
        "".join(
            json.dumps({"custom_id": str(n), "messages": [{"role": "user", "content": f"q{n}"}]}) + "\n"
            for n in range(3)
        )
    )
    said = [("2", 200, "a2"), ("0", 200, "a0"), ("1", 400, "")]
    lines = [
        {"custom_id": id, "response": {"status_code": code, "body": {"choices": [{"message": {"content": text}}]}}}
        for id, code, text in said
    ]
    answered.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [[message["content"] for message in messages] for messages in join(asked, answered)] == [
        ["q0", "a0"],
        ["q2", "a2"],
    ]
