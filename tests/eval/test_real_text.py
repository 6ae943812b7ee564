"""Mistakes of the questions about real text: no answer in it, the answer in the question, a text read twice."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM

from trimkv_cli.engine.engine import Engine
from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.eval.exam import EvalOptions, Exam, make_exams
from trimkv_cli.eval.facts import TOPICS, draw_facts
from trimkv_cli.eval.instructions import SYSTEMS
from trimkv_cli.eval.others import score_answers
from trimkv_cli.eval.rules import Rule
from trimkv_cli.eval.run import evaluate
from trimkv_cli.eval.samples import Sample, export_line, read_samples
from trimkv_cli.eval.scoring import bootstrap, interval, is_right, judge
from trimkv_cli.eval.text_tasks import draw_documents
from trimkv_cli.eval.texts import RealText, Sentence, weave
from trimkv_cli.loading.loader import load_engine, load_text
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import find_source
from trimkv_cli.mini import MODEL_FOLDER
from trimkv_cli.request import Request

TEXT = RealText.read(())


def _count(sentence: str) -> int:
    return 2 * len(sentence.split())


def _draw(number: int, task: str = "needle", *, chat: bool = True, **changes: int) -> list[Sample]:
    options = {"tokens": 600, "seed": 7} | changes
    return list(islice(draw_documents(task, text=TEXT, count=_count, chat=chat, **options), number))


def test_sentences_are_parted_and_joined() -> None:
    """Catches a sentence that is lost or cut, and paragraphs that run together."""
    text = RealText('One is\nhere. "Two," he said.\n\nThree!  Four 3.5 is no end.')
    assert [sentence.text for sentence in text.sentences] == [
        "One is here.", '"Two," he said.', "Three!", "Four 3.5 is no end."
    ]  # fmt: skip
    assert weave(text.sentences, [], Random(1)) == 'One is here. "Two," he said.\n\nThree! Four 3.5 is no end.'
    told = [f"Told {n}." for n in range(5)]
    woven = weave(text.sentences, told, Random(1))
    assert all(woven.count(one) == 1 for one in told)


def test_a_fact_is_told_in_one_sentence_and_asked_for_in_others() -> None:
    """Catches a question that repeats the statement, or says the answer."""
    for topic in TOPICS:
        for told in topic.told:
            assert told.count("{v}") == 1
            for asked in topic.asked:
                assert "{" not in asked
                assert asked.endswith("?")
                same = set(told.casefold().rstrip(".").split()) & set(asked.casefold().rstrip("?").split())
                assert len(same) < len(told.split()) - 2


def test_facts_of_a_document_differ() -> None:
    """Catches two facts with one value, so that a wrong answer counts, and a value that another one contains."""
    for seed in range(50):
        facts = draw_facts(Random(seed), 8)
        assert len({fact.value for fact in facts}) == 8
        assert all(is_right(wording, wording, "contains") for fact in facts for wording in (fact.value, *fact.also))


@pytest.mark.parametrize("chat", [True, False])
def test_the_document_tells_what_is_asked(chat: bool) -> None:
    """Catches a fact that is not told or told twice, and questions that depend on how many there are."""
    samples = _draw(20, chat=chat)
    assert samples[:9] == _draw(9, chat=chat)
    assert not {sample.last for sample in samples} & {sample.last for sample in _draw(20, chat=chat, seed=8)}
    assert [sample.document for sample in samples[:9]] == ["needle-7-0"] * 8 + ["needle-7-1"]
    for sample in samples:
        document, question = sample.last[: sample.head], sample.last[sample.head :]
        assert document.count(sample.answer) >= 1
        assert sample.answer not in question
        assert document == samples[samples.index(sample) // 8 * 8].last[: sample.head]
        assert 400 < _count(sample.last) < 700


@pytest.mark.parametrize("chat", [True, False])
def test_a_chat_tells_before_it_asks_and_answers_rightly(chat: bool) -> None:
    """Catches a fact that is asked for but never told, and a history with wrong answers or with the one wanted."""
    for sample in _draw(12, "multi-turn", chat=chat):
        told = "".join(m["content"] for m in sample.messages[:-1]) if chat else (sample.prompt or "")[: sample.head]
        assert told.count(sample.answer) >= 1
        assert 350 < _count(told) < 700
        if chat:
            assert [m["role"] for m in sample.messages] == ["user", "assistant"] * 6 + ["user"]
            for asked, said in zip(sample.messages[::2], sample.messages[1::2], strict=False):
                if asked["content"].endswith("few words."):
                    assert said["content"].removesuffix(".") in told.replace(asked["content"], "")


@pytest.mark.parametrize("chat", [True, False])
def test_instructions_come_first_and_points_are_told(chat: bool) -> None:
    """Catches rules that the model is not told or is told in the question, and points that a summary cannot know."""
    for sample in _draw(40, "instructions", chat=chat):
        whole = sample.messages[0]["content"] if chat else (sample.prompt or "")[:300]
        (rule,) = sample.rules
        assert rule.value in whole
        assert rule.value not in sample.question
    for sample in _draw(3, "summary-recall", chat=chat):
        assert len(sample.points) == 8
        assert all(point in sample.last for point in sample.points)
        assert judge(sample.last, sample, "contains") == 1.0
        assert judge(sample.points[0], sample, "contains") == 1 / 8


@pytest.mark.parametrize(
    ("rule", "kept", "broken"),
    [
        (Rule(kind="starts", value="Well"), "well, yes", "Oh well"),
        (Rule(kind="ends", value="over and out"), "Yes. Over and out.", "over and out, he said"),
        (Rule(kind="says", value="by the way"), "Yes, by the way.", "by the ways"),
        (Rule(kind="avoids", value="the"), "A theme", "See The end"),
        (Rule(kind="lower-case"), "all lower", "Not all"),
        (Rule(kind="upper-case"), "ALL UP 1", "Not"),
        (Rule(kind="no-digits"), "one", "1"),
        (Rule(kind="no-commas"), "one and two", "one, two"),
        (Rule(kind="no-exclamation"), "no.", "no!"),
        (Rule(kind="one-line"), "one line ", "one\nline"),
        (Rule(kind="most-words", value="2"), "two words", "now three words"),
        (Rule(kind="asks"), "Is it?", "It is."),
        (Rule(kind="language", value="French"), "Le texte est d'un garçon.", "El texto es de un niño."),
        (Rule(kind="language", value="German"), "Die Frau ist in der Stadt.", "The lady is in a town."),
        (Rule(kind="language", value="Italian"), "Il testo è di un ragazzo.", "Le texte est de la ville."),
        (Rule(kind="language", value="Spanish"), "El niño y la mujer.", "Olivia."),
    ],
)
def test_rules_are_checked(rule: Rule, kept: str, broken: str) -> None:
    """Catches a rule that is kept by everything, or by an answer that says nothing."""
    assert rule.kept(kept)
    assert not rule.kept(broken)
    assert not rule.kept("")


def test_what_is_exported_is_read_again(tmp_path: Path) -> None:
    """Catches a question whose rules, wordings or boundary get lost on the way to another program."""
    samples = [replace(s, id=f"{n}") for n, s in enumerate(_draw(9) + _draw(2, "instructions") + _draw(1, chat=False))]
    samples += [replace(sample, id=f"p{n}") for n, sample in enumerate(_draw(1, "summary-recall"))]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(export_line(sample, seed=7) + "\n" for sample in samples))
    assert read_samples(str(path)) == samples
    first = json.loads(path.read_text().splitlines()[0])
    assert first["messages"][-1]["content"][first["head"] :] == first["question"]


def test_answers_of_others_are_scored_as_ours(tmp_path: Path) -> None:
    """Catches answers under two policies, or to two tasks, mixed, and a question without an answer left out."""
    samples = [replace(sample, id=f"{n}") for n, sample in enumerate(_draw(16))]
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "snapkv.jsonl"
    questions.write_text("".join(export_line(sample) + "\n" for sample in samples))
    lines = [{"id": s.id, "output": f"It is {s.answer}."} for s in samples]
    lines += [{"id": s.id, "output": "None.", "policy": "tova", "kv_budget": 64} for s in samples]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = score_answers(str(questions), str(answers), None)
    assert [(r.policy, r.kv_budget, r.accuracy, r.n, r.documents) for r in rows] == [
        ("snapkv", None, 1.0, 16, 2), ("tova", 64, 0.0, 16, 2)
    ]  # fmt: skip
    by_task = [replace(s, task="needle" if n < 8 else "chat", match="exact") for n, s in enumerate(samples)]
    questions.write_text("".join(export_line(sample) + "\n" for sample in by_task))
    rows = score_answers(str(questions), str(answers), None)
    assert [(r.task, r.policy, r.accuracy, r.n, r.documents) for r in rows] == [
        ("needle", "snapkv", 0.0, 8, 1), ("needle", "tova", 0.0, 8, 1),
        ("chat", "snapkv", 0.0, 8, 1), ("chat", "tova", 0.0, 8, 1),
    ]  # fmt: skip
    assert score_answers(str(questions), str(answers), "contains")[2].accuracy == 1.0
    for bad, said in (
        (lines[1:], "1 questions have no answer, 0 among them"),
        ([*lines, {"id": "x", "output": ""}], "no question x"),
        ([*lines, lines[0]], "0 is answered twice under snapkv"),
        ([{"id": 1, "output": ""}], "id and output must be texts"),
    ):
        answers.write_text("".join(json.dumps(line) + "\n" for line in bad))
        with pytest.raises(InputError, match=said):
            score_answers(str(questions), str(answers), None)


def test_perplexity_is_that_of_one_forward() -> None:
    """Catches a token that is skipped, counted twice or scored at a neighbour's place where chunks meet."""
    source, engine = find_source(EngineOptions(model="mini"), weights=True), EngineOptions(model="mini", threads=1)
    asked = EvalOptions(
        tasks=("ppl",), context=100, budgets=("100", "8"), policies=("full", "streaming"), prefill_chunk=32
    )
    full, whole, small = evaluate(source, engine, asked, say=lambda _: None)
    text = load_text(source, trust_remote_code=False)
    assert text is not None
    ids = torch.tensor([text.encode(TEXT.text)[:100]])
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    assert full.nats == pytest.approx(expected, rel=1e-3)
    assert whole.nats == pytest.approx(expected, rel=1e-3)
    assert (full.n, full.accuracy, full.ratio) == (99, None, 1.0)
    assert small.nats is not None
    assert small.ratio == pytest.approx(math.exp(small.nats - expected), rel=1e-2)
    assert small.ratio != pytest.approx(1.0, abs=1e-3)


def test_a_file_of_several_tasks_is_asked_task_by_task(engine: Engine, tmp_path: Path) -> None:
    """Catches one row for all of a file, a limit that leaves tasks out, and answers judged in another way."""
    assert engine.text is not None
    options = EvalOptions(tasks=("needle", "recall"), context=200, samples=3, seed=7)
    exams = list(make_exams(options, engine.text))
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(export_line(q.sample) + "\n" for exam in exams for q in exam.samples))
    again = list(make_exams(EvalOptions(tasks=(), data=str(path), samples=2), engine.text))
    assert [(exam.task, exam.match) for exam in again] == [("needle", "contains"), ("recall", "exact")]
    assert [exam.samples for exam in again] == [exam.samples[:2] for exam in exams]
    with pytest.raises(UsageError, match="recall is asked by --tasks and by --data"):
        list(make_exams(replace(options, data=str(path), tasks=("recall",)), engine.text))


def test_a_text_that_is_too_short_is_refused() -> None:
    """Catches documents shorter than the table says."""
    with pytest.raises(InputError, match="are to be asked about"):
        _draw(1, tokens=50_000)


def test_every_ten_samples_have_all_system_messages() -> None:
    """Catches messages that chance leaves out of a small sample, and rules that are never asked for."""
    assert len({instruction.rule for message in SYSTEMS for instruction in message}) == 40
    for seed in (7, 8):
        samples = _draw(40, "instructions", seed=seed)
        told = [sample.messages[0]["content"] for sample in samples]
        assert all(len(set(told[start : start + 10])) == 10 for start in range(30))
        assert len({sample.rules for sample in samples}) == 40


def test_other_wordings_of_a_value_count() -> None:
    """Catches `March 3` counted as wrong where `3 March` was told."""
    sample = Sample(answer="3 March", also=("March 3",))
    assert [judge(said, sample, "contains") for said in ("on March 3, yes", "3 march", "13 March", "")] == [1, 1, 0, 0]


def test_intervals_take_documents_whole() -> None:
    """Catches questions about one text taken for independent: the interval must be that of the texts."""
    scores, documents = [1.0] * 8 + [0.0] * 8, ["a"] * 8 + ["b"] * 8
    assert bootstrap(scores, documents) == (0.0, 1.0)
    assert bootstrap([1.0, 0.0] * 8, documents) == (0.5, 0.5)
    assert interval([1.0, 0.0, 0.5], ["one"] * 3) is None  # its own score, drawn again and again
    assert interval([0.4], ["one"]) is None
    assert bootstrap(scores, list(map(str, range(16)))) == bootstrap(scores, list(map(str, range(16))))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(EngineOptions(model="mini", threads=1, kv_budget="48", prefill_chunk=32, max_inflight=16))


@pytest.fixture(scope="module")
def exam(engine: Engine) -> Exam:
    assert engine.text is not None
    (exam,) = make_exams(EvalOptions(context=300, samples=10, max_tokens=4), engine.text)
    return exam


def _ask(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    said: dict[str, list[int]] = {request.id: [] for request in requests}
    for event in engine.generate(requests):
        said[event.request_id] += event.token_ids
    return said


def test_a_document_is_read_once_for_all_its_questions(engine: Engine, exam: Exam) -> None:
    """Catches documents read again, and tokens other than when each question is asked alone."""
    requests = [q.request for q in exam.samples]
    assert all(0 < len(one.prompt_token_ids) - one.document_len < 60 for one in requests)
    before = engine.stats.prefill_tokens
    together = _ask(engine, requests)
    read = engine.stats.prefill_tokens - before
    tails = sum(len(one.prompt_token_ids) - one.document_len for one in requests)
    assert read == tails + requests[0].document_len + requests[8].document_len
    alone = {}
    for request in requests:
        engine._scheduler.forget_prefix()
        alone |= _ask(engine, [request])
    assert together == alone


def test_system_pins_are_not_the_document(exam: Exam) -> None:
    """Catches a document pinned as if it were the system message."""
    assert all(q.request.prefix_len == 0 for q in exam.samples)
    assert replace(exam.samples[0].request, prefix_len=3).shared_len == exam.samples[0].request.document_len


def test_files_are_read_in_their_order(tmp_path: Path) -> None:
    """Catches a file that is left out, and bytes that are no text."""
    paths = [tmp_path / name for name in ("b.txt", "a.txt")]
    for path in paths:
        path.write_text(f"This is {path.name}.")
    text = RealText.read([str(path) for path in paths])
    assert text.sentences == [Sentence(text=f"This is {path.name}.", begins=True) for path in paths]
    paths[0].write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        RealText.read([str(paths[0])])
