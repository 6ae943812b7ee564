"""Mistakes of the comparison itself: policies that share gates or caches, tables that change from run to run."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from trimkv_cli.commands.eval import summarize_in_parts
from trimkv_cli.engine.engine import Engine
from trimkv_cli.errors import ContextOverflow, DoesNotFit, UsageError
from trimkv_cli.eval import run, setups
from trimkv_cli.eval.exam import EncodedSample, EvalOptions, Exam
from trimkv_cli.eval.run import evaluate
from trimkv_cli.eval.scoring import EvalResult
from trimkv_cli.eval.setups import RandomGate
from trimkv_cli.events import Answer
from trimkv_cli.loading.loader import load_engine, plan_for
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import Source, find_source
from trimkv_cli.plan.plan import Plan
from trimkv_cli.request import Request, SamplingParams

ENGINE = EngineOptions(model="mini", threads=1)
TOKENS = 6


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write questions whose answers are what the model says with a full cache."""
    llm = load_engine(replace(ENGINE, gates="none", kv_budget="256", prefill_chunk=8))
    assert llm.text is not None
    asked = [f"My {thing} is in {place}. " * 3 + "Tell me more." for thing, place in _THINGS]
    prompts = [llm.text.render_chat([{"role": "user", "content": text}]).token_ids for text in asked]
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0)
    said = dict.fromkeys(asked, "")
    for event in llm.generate(
        Request(id=text, prompt_token_ids=ids, params=params) for text, ids in zip(asked, prompts, strict=True)
    ):
        said[event.request_id] += event.text
    lines = [{"messages": [{"role": "user", "content": text}], "answer": said[text]} for text in asked]
    path = tmp_path_factory.mktemp("own") / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line["answer"].strip()))
    return str(path)


_THINGS = [("boat", "Milo"), ("cat", "Zanuk"), ("shop", "Feda"), ("horse", "Tipo"), ("lamp", "Guvar"), ("key", "Sol")]


def _run(own: str, **changes: object) -> list[EvalResult]:
    asked = EvalOptions(tasks=(), data=own, max_tokens=TOKENS, prefill_chunk=8, **changes)  # type: ignore[arg-type]
    return evaluate(find_source(ENGINE, weights=True), ENGINE, asked, say=lambda _: None)


def test_a_cache_that_holds_everything_is_a_full_cache(own: str) -> None:
    """Catches gates of another policy that are left in the model, and eviction where there is room."""
    rows = _run(own, budgets=("300",))
    assert [(row.policy, row.kv_budget) for row in rows] == [
        ("full", None), ("gates", 300), ("keydiff", 300), ("streaming", 300), ("protected", 300), ("random", 300)
    ]  # fmt: skip
    assert all(row.accuracy == 1.0 and row.n >= 3 for row in rows)


def test_small_caches_run_under_their_own_policies(own: str) -> None:
    """Catches budgets that do not reach the cache, and rows in the order in which they ran."""
    rows = _run(own, budgets=("18", "6"), policies=("random", "streaming", "full"))
    assert [(row.policy, row.kv_budget) for row in rows] == [
        ("random", 18), ("random", 6), ("streaming", 18), ("streaming", 6), ("full", None)
    ]  # fmt: skip
    assert rows[-1].accuracy == 1.0
    assert min(row.accuracy for row in rows) < 1.0
    assert rows[0].kv_bytes == 3 * rows[1].kv_bytes
    assert [row.peak_bytes for row in sorted(rows, key=lambda row: row.kv_bytes)] == sorted(r.peak_bytes for r in rows)


def test_the_same_seed_gives_the_same_table() -> None:
    """Catches a table that depends on when it was made; only speed and peak may."""
    asked = EvalOptions(tasks=("recall",), context=60, samples=3, seed=7, budgets=("16",), prefill_chunk=16)
    source = find_source(ENGINE, weights=True)
    first, second = (evaluate(source, ENGINE, asked, say=lambda _: None) for _ in range(2))
    assert [replace(row, decode_tps=0, peak_bytes=0) for row in first] == [
        replace(row, decode_tps=0, peak_bytes=0) for row in second
    ]


def test_map_reduce_summarizes_within_its_slots() -> None:
    """Catches parts that take more slots than the row says, and a text that fits read in another way."""
    asked = EvalOptions(
        tasks=("summary-recall", "needle"), context=300, samples=2, max_tokens=8, prefill_chunk=0,
        budgets=("90", "200", "600"), policies=("full", "map-reduce"),
    )  # fmt: skip
    positions: list[int] = []

    def summarize(llm: Engine, samples: Sequence[EncodedSample]) -> Iterator[tuple[str, Answer]]:
        for key, answer in summarize_in_parts(llm, samples):
            positions.append(llm.facts.max_positions)
            assert answer.stats.prompt_tokens + answer.stats.completion_tokens <= llm.facts.max_positions
            yield key, answer

    said: list[str] = []
    rows = evaluate(find_source(ENGINE, weights=True), ENGINE, asked, say=said.append, summarize=summarize)
    assert [(row.task, row.policy, row.kv_budget, row.n) for row in rows] == [
        ("summary-recall", "full", None, 2),
        ("summary-recall", "map-reduce", 200, 2),
        ("summary-recall", "map-reduce", 600, 2),
        ("needle", "full", None, 2),
    ]
    assert positions == [200, 200, 600, 600]
    assert rows[2].answer_tokens == rows[0].answer_tokens
    assert "map-reduce is left out where a part of the text and its summary have no room" in said
    for changes, hint in (({"tasks": ("needle",)}, "--tasks summary-recall"), ({"budgets": ("90",)}, "--budgets ")):
        with pytest.raises(UsageError) as caught:
            evaluate(find_source(ENGINE, weights=True), ENGINE, replace(asked, **changes), say=said.append)
        assert hint in (caught.value.hint or "")


def test_all_caches_are_planned_before_a_weight_is_read(own: str) -> None:
    """Catches a budget that is broken by the full cache after an hour of the others."""
    asked = EvalOptions(tasks=(), data=own, budgets=("8",))
    with pytest.raises(DoesNotFit):
        evaluate(find_source(ENGINE, weights=True), replace(ENGINE, budget="1MiB"), asked, say=lambda _: None)


def test_rows_that_nobody_asked_for_are_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an evaluation refused where memory holds fewer rows, and rows that were asked for made fewer."""

    def plan_few(source: Source, options: EngineOptions, device: torch.device) -> Plan:
        if (options.max_inflight or 1) > 9:
            raise DoesNotFit("no memory for so many", hint="")
        return plan_for(source, options, device)

    monkeypatch.setattr(setups, "plan_for", plan_few)
    source, asked = find_source(ENGINE, weights=True), EvalOptions(context=100, budgets=("8",))
    exam = cast(Exam, None)
    _, planned = setups.plan_setups(source, ENGINE, asked, [exam], 100)
    assert {setup.plan.run.rows for setup in planned} == {8}
    _, planned = setups.plan_setups(source, ENGINE, asked, [], 100)
    assert {setup.plan.run.rows for setup in planned} == {1}
    with pytest.raises(DoesNotFit):
        setups.plan_setups(source, replace(ENGINE, max_inflight=10), asked, [exam], 100)


def test_one_cache_is_gone_before_the_next_is_made(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two caches side by side, which no plan counts."""
    make, caches, alive = run._engine, list[weakref.ref[object]](), list[int]()

    def engine(*given: Any) -> Engine:
        alive.append(sum(cache() is not None for cache in caches))
        llm = make(*given)
        caches.append(weakref.ref(llm._runner.cache))
        return llm

    monkeypatch.setattr(run, "_engine", engine)
    _run(own, budgets=("18", "6"), policies=("gates", "streaming", "full"))
    assert alive == [0] * 5


def test_a_context_past_the_models_positions_is_refused_before_it_is_written() -> None:
    """Catches minutes of making questions that the model cannot be asked."""
    asked = EvalOptions(tasks=("recall",), context=10**9, samples=1)
    with pytest.raises(ContextOverflow, match="65,536 positions"):
        evaluate(find_source(ENGINE, weights=True), ENGINE, asked, say=lambda _: None)


def test_constant_gates_do_not_stand_for_trained_ones() -> None:
    """Catches `--gates streaming` reported as what gates achieve."""
    engine = replace(ENGINE, gates="streaming")
    with pytest.raises(UsageError):
        evaluate(find_source(engine, weights=True), engine, EvalOptions(), say=lambda _: None)


def test_random_scores_are_of_the_seed() -> None:
    """Catches scores that change between runs, or with the batch that a token is in."""
    gate, same, other = (RandomGate(num_kv_heads=2, positions=10, seed=seed) for seed in (1, 1, 2))
    positions = torch.tensor([[3, 4, -1], [4, 3, 9]])
    values = gate(torch.zeros(2, 3, 8), positions)
    assert values.shape == (2, 3, 2)
    assert torch.equal(values, same(torch.zeros(2, 3, 8), positions))
    assert torch.equal(values[0, 0], values[1, 1])
    assert not torch.equal(values, other(torch.zeros(2, 3, 8), positions))
    assert ((values <= 0) & (values > -1)).all()
