"""Mistakes in summarizing many documents over shared rows: mixed answers, texts cut off, one fault that stops all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from trimkv_cli.commands.summarize.pool import Chain, DocumentSummary, Outcome, Pool, Task, summarize_text
from trimkv_cli.commands.summarize.texts import TL_DR
from trimkv_cli.errors import ContextOverflow, InputError, OutOfDeviceMemory, TrimkvError
from trimkv_cli.events import Answer, CacheStats, RequestStats, TokenEvent
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import SamplingParams

TEXTS = [f"Note {i}: the box {i} is in room {i * 7}. We walked along the river.\n" * 4 for i in range(5)]


def make_llm(rows: int, context: int | None = None) -> Any:
    return load_engine(EngineOptions(kv_budget="32", threads=1, max_inflight=rows, context=context, deterministic=True))


def make_task(*, map_reduce: bool = False, said: bool = True, max_tokens: int = 8) -> Task:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return Task(instruction="Go.", params=params, max_tokens_said=said, think=None, map_reduce=map_reduce)


def summarize(llm: Any, texts: list[str | None], task: Task) -> tuple[dict[int, Outcome], list[int]]:
    """Run texts, None being one that cannot be read; return outcomes and whose rows were seen before they went."""
    seen: list[int] = []

    def chain(index: int, text: str | None) -> Chain:
        if text is None:
            raise InputError("cannot read it", hint="check")
        return (yield from summarize_text(llm, str(index), text, task))

    def keep(index: int, answer: Answer) -> None:
        assert llm.kept.seen(answer.request.id) > 0
        seen.append(index)

    def chains() -> Iterator[Chain]:
        return (chain(index, text) for index, text in enumerate(texts))

    pool = Pool(llm, on_text=lambda *_: None, on_answer=keep)
    outcomes = dict(pool.run(chains(), lambda: None))
    assert pool.num_open == 0
    assert not llm.has_work
    return outcomes, seen


def text_of(outcome: Outcome) -> str:
    assert isinstance(outcome, DocumentSummary)
    return outcome.answer.text


def test_documents_share_rows_and_a_fault_stops_none() -> None:
    """Catches answers given to another document, a fault that ends the run, and rows that are never freed."""
    llm = make_llm(rows=2)
    texts = [*TEXTS[:2], None, *TEXTS[2:], None]
    outcomes, seen = summarize(llm, texts, make_task())
    assert [index for index, outcome in sorted(outcomes.items()) if isinstance(outcome, TrimkvError)] == [2, 6]
    assert sorted(seen) == [0, 1, 3, 4, 5]
    alone = [text_of(summarize(llm, [text], make_task())[0][0]) for text in TEXTS]
    assert [text_of(outcomes[index]) for index in (0, 1, 3, 4, 5)] == alone


def test_a_request_given_up_fails_its_document_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half an answer taken for a summary, parts that go on for nobody, and a row that is never freed."""
    llm = make_llm(rows=2, context=200)
    step, broken = llm.step, []

    def failing() -> list[TokenEvent]:
        events = step()
        for index, event in enumerate(events):
            if event.finish_reason is not None and event.request_id.startswith("1#") and not broken:
                broken.append(event.request_id)
                memory = {"finish_reason": "error", "error": "out of memory", "error_code": "out_of_memory"}
                events[index] = replace(event, **memory)
        return list(events)

    monkeypatch.setattr(llm, "step", failing)
    outcomes, _ = summarize(llm, [TEXTS[0], "".join(TEXTS), TEXTS[1]], make_task(map_reduce=True))
    assert isinstance(outcomes[1], OutOfDeviceMemory)
    assert [type(outcomes[index]) for index in (0, 2)] == [DocumentSummary, DocumentSummary]
    assert not llm._scheduler.parked


def test_a_long_text_is_refused_or_reduced_never_cut() -> None:
    """Catches silent truncation, parts that are left out, and a hint that names one way only."""
    llm, text = make_llm(rows=2, context=200), "".join(TEXTS)
    refused = summarize(llm, [text], make_task())[0][0]
    assert isinstance(refused, ContextOverflow)
    assert refused.hint is not None
    assert "map-reduce" in refused.hint
    assert "rebase" in refused.hint
    reduced = summarize(llm, [text], make_task(map_reduce=True))[0][0]
    assert isinstance(reduced, DocumentSummary)
    assert reduced.parts > 2
    assert reduced.rounds >= 2
    assert reduced.prompt_tokens > len(llm.text.encode(text))


def test_a_length_that_nobody_gave_is_what_is_left() -> None:
    """Catches a refusal of 512 tokens that the user never asked for, and a length given that is changed."""
    llm = make_llm(rows=1, context=260)
    task = make_task(said=False, max_tokens=512)
    outcome = summarize(llm, [TEXTS[0]], task)[0][0]
    assert isinstance(outcome, DocumentSummary)
    asked = outcome.answer.request
    assert asked.params.max_tokens == 260 - len(asked.prompt_token_ids) + 1
    refused = summarize(llm, [TEXTS[0]], make_task(said=True, max_tokens=512))[0][0]
    assert isinstance(refused, ContextOverflow)


def test_summaries_that_do_not_shorten_end_in_an_error() -> None:
    """Catches a loop without an end."""
    llm = make_llm(rows=2, context=200)
    text = "".join(TEXTS)
    chain = summarize_text(llm, "0", text, make_task(map_reduce=True))
    stage = next(chain)
    assert not stage.last
    stats = RequestStats(
        prompt_tokens=1,
        completion_tokens=1,
        shared_prefix_tokens=0,
        queue_s=0.0,
        ttft_s=0.0,
        total_s=0.0,
        cache=CacheStats(seen_tokens=1, kept_per_head=1, evicted=0),
    )
    long = Answer(stage.requests[0])
    long.take(TokenEvent(request_id=long.request.id, text=text, finish_reason="length", stats=stats))
    with pytest.raises(ContextOverflow, match="no shorter"):
        chain.send([long] * len(stage.requests))


@pytest.mark.parametrize("max_tokens", [140, 199])
def test_no_room_for_a_part_is_said(max_tokens: int) -> None:
    """Catches parts of no tokens."""
    llm = make_llm(rows=1, context=200)
    outcome = summarize(llm, ["".join(TEXTS)], make_task(map_reduce=True, max_tokens=max_tokens))[0][0]
    assert isinstance(outcome, ContextOverflow)
    assert "leave no room" in outcome.message


def test_a_model_without_a_template_continues_the_text() -> None:
    """Catches `summarize --raw` that needs the template all the same."""
    llm = make_llm(1)
    chain = summarize_text(llm, "a", TEXTS[0], replace(make_task(), instruction=TL_DR, raw=True))
    (request,) = next(chain).requests
    assert list(request.prompt_token_ids) == llm.text.encode(f"{TEXTS[0]}\n\nTL;DR:")
