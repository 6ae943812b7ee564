"""Answers that another program gave to exported questions, scored as our own are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trimkv_cli.errors import InputError
from trimkv_cli.eval.samples import Match, OtherAnswers, Sample, by_task, read_answers, read_samples
from trimkv_cli.eval.scoring import EvalResult, interval, judge


def score_answers(questions: str, answers: str, match: Match | None) -> list[EvalResult]:
    """Return a row for each task, policy and size; `match` None is what the questions say, or else `contains`.

    Raises:
        InputError: a file that cannot be read, a bad line, or a question without an answer, or the reverse.
    """
    samples = read_samples(questions)
    known = {sample.id for sample in samples}
    if len(known) < len(samples) or "" in known:
        raise InputError(f"{questions}: questions need ids that differ", hint="trimkv eval --export writes them")
    tables = read_answers(answers)
    for table in tables:
        _check_all(samples, table, answers)
    return [
        _row(task, asked, table, match or asked[0].match or "contains")
        for task, asked in by_task(samples, other=Path(questions).stem).items()
        for table in tables
    ]


def _check_all(samples: Sequence[Sample], table: OtherAnswers, answers: str) -> None:
    absent = [sample.id for sample in samples if sample.id not in table.said]
    beyond = set(table.said) - {sample.id for sample in samples}
    if absent or beyond:
        what = (
            f"{len(absent)} questions have no answer, {absent[0]} among them"
            if absent
            else f"no question {min(beyond)}"
        )
        raise InputError(f"{answers}: {table.policy}: {what}", hint="answer every exported question once")


def _row(task: str, samples: Sequence[Sample], table: OtherAnswers, match: Match) -> EvalResult:
    scores = [judge(table.said[sample.id], sample, match) for sample in samples]
    documents = [sample.document or sample.id for sample in samples]
    return EvalResult(
        task=task,
        policy=table.policy,
        kv_budget=table.kv_budget,
        accuracy=sum(scores) / len(scores),
        n=len(scores),
        ci95=interval(scores, documents),
        answer_logprob=None,
        decode_tps=0.0,
        peak_bytes=0,
        kv_bytes=0,
        prefill_chunk=0,
        context=0,
        prompt_tokens=0.0,
        seed=0,
        documents=len(set(documents)),
        match=match,
    )
