"""Logits that are no numbers never become an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.engines import Shape, greedy, make_engine
from trimkv_cli.engine.sampler import NO_TOKEN, Sampler
from trimkv_cli.errors import TrimkvError
from trimkv_cli.events import TokenEvent
from trimkv_cli.request import Request, SamplingParams

TinyModel = Callable[..., Any]
SHAPE = Shape(kv_budget=16, gate="random", rows=3, prefill_chunk=16)
POISON = 77


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("more", [{"temperature": 0.0}, {"top_k": 5, "seed": 3}, {"repetition_penalty": 1.5}])
def test_the_sampler_has_no_token_where_logits_are_no_numbers(fault: float, more: dict[str, Any]) -> None:
    """Catches an id drawn from NaN, and one row's fault that reaches the row beside it."""
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    sampler, alone = (Sampler(2, 50, "cpu") for _ in range(2))
    for each in (sampler, alone):
        for row in range(2):
            each.set_row(row, SamplingParams(**more), (1, 2))
    want = alone(logits, [0, 1]).tolist()
    broken = logits.clone()
    broken[0] = fault
    assert sampler(broken, [0, 1]).tolist() == [NO_TOKEN, want[1]]


def poisoned(model: TinyModel, family: str, token: int) -> Any:
    """Make a model that computes NaN from one token on."""
    made = model(family, tie_word_embeddings=False)
    made.get_input_embeddings().weight.data[token] = float("nan")
    return made


def last_events(engine: Any, requests: list[Request]) -> dict[str, TokenEvent]:
    return {event.request_id: event for event in engine.generate(requests) if event.finish_reason is not None}


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])  # with the CPU's decoder, and without
@pytest.mark.parametrize("deterministic", [False, True])
def test_only_the_request_whose_logits_are_no_numbers_fails(
    tiny_model: TinyModel, family: str, deterministic: bool
) -> None:
    """Catches an empty answer in place of an error, and a poisoned slot that its next user sees."""
    shape = replace(SHAPE, deterministic=deterministic)
    fine = [greedy(str(i), range(3 + i, 30 + i), 6) for i in range(4)]
    bad = greedy("bad", [*range(3, 20), POISON], 6)
    want = last_events(make_engine(tiny_model(family, tie_word_embeddings=False), shape), fine)
    engine = make_engine(poisoned(tiny_model, family, POISON), shape)
    got = last_events(engine, [fine[0], bad, *fine[1:]])
    failed = got.pop("bad")
    assert (failed.finish_reason, failed.error_code, failed.token_ids) == ("error", "not_finite", ())
    assert isinstance(failed.fault, TrimkvError)
    assert {name: event.token_ids for name, event in got.items()} == {name: e.token_ids for name, e in want.items()}


@pytest.mark.parametrize("ahead", [False, True])
def test_an_answer_that_becomes_no_numbers_ends_there(tiny_model: TinyModel, ahead: bool) -> None:
    """Catches a fault in the middle of an answer that is taken for a token, on the host or on the device."""
    asked = greedy("a", range(3, 30), 8)
    plain = make_engine(tiny_model("qwen3", tie_word_embeddings=False), SHAPE)
    output = [token for event in plain.generate([asked]) for token in event.token_ids]
    assert output[2] not in (*output[:2], *asked.prompt_token_ids)
    engine = make_engine(poisoned(tiny_model, "qwen3", output[2]), SHAPE, fast_path=not ahead)
    if ahead:
        engine._runner.run_ahead(frozenset())
    events = list(engine.generate([asked]))
    assert [token for event in events for token in event.token_ids] == output[:3]
    assert events[-1].error_code == "not_finite"
    assert not engine.has_work
