"""Mistakes of the questions about real text: no answer in it, the answer in the question, a text read twice."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from trimkv_cli.engine.engine import Engine
from trimkv_cli.errors import InputError
from trimkv_cli.eval.exam import EvalOptions, Exam, make_exams
from trimkv_cli.eval.facts import TOPICS, draw_facts
from trimkv_cli.eval.samples import Sample
from trimkv_cli.eval.scoring import bootstrap, is_right, judge
from trimkv_cli.eval.text_tasks import draw_documents
from trimkv_cli.eval.texts import RealText, Sentence, weave
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import Request

TEXT = RealText.read(())


def _count(sentence: str) -> int:
    return 2 * len(sentence.split())


def _draw(number: int, *, chat: bool = True, **changes: int) -> list[Sample]:
    options = {"tokens": 600, "seed": 7} | changes
    return list(islice(draw_documents("needle", text=TEXT, count=_count, chat=chat, **options), number))


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


def test_a_text_that_is_too_short_is_refused() -> None:
    """Catches documents shorter than the table says."""
    with pytest.raises(InputError, match="are to be asked about"):
        _draw(1, tokens=50_000)


def test_other_wordings_of_a_value_count() -> None:
    """Catches `March 3` counted as wrong where `3 March` was told."""
    sample = Sample(answer="3 March", also=("March 3",))
    assert [judge(said, sample, "contains") for said in ("on March 3, yes", "3 march", "13 March", "")] == [1, 1, 0, 0]


def test_intervals_take_documents_whole() -> None:
    """Catches questions about one text taken for independent: the interval must be that of the texts."""
    scores, documents = [1.0] * 8 + [0.0] * 8, ["a"] * 8 + ["b"] * 8
    assert bootstrap(scores, documents) == (0.0, 1.0)
    assert bootstrap([1.0, 0.0] * 8, documents) == (0.5, 0.5)
    assert bootstrap(scores, list(map(str, range(16)))) == bootstrap(scores, list(map(str, range(16))))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(EngineOptions(model="mini", threads=1, kv_budget="48", prefill_chunk=32, max_inflight=16))


@pytest.fixture(scope="module")
def exam(engine: Engine) -> Exam:
    assert engine.text is not None
    (exam,) = make_exams(EvalOptions(context=400, samples=16, max_tokens=6), engine.text)
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
