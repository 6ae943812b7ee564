"""Decoding one step ahead of the host: the same loop without graphs here, with them on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from helpers.engines import Shape, greedy, make_engine, run
from trimkv_cli.engine.engine import Engine
from trimkv_cli.request import Request, SamplingParams

TinyModel = Callable[..., Any]
SHAPE = Shape(kv_budget=16, gate="random", rows=3, prefill_chunk=16)
EOS = frozenset({7, 11, 40, 77, 90})


def make_requests() -> list[Request]:
    """Return greedy and sampled requests of different lengths, some that end early, one that must run in step."""
    requests = []
    for i in range(8):
        more: dict[str, Any] = {"temperature": 0.0} if i % 2 else {"temperature": 1.5, "seed": i}
        more |= {"logprobs": 1} if i == 5 else {}
        params = SamplingParams(max_tokens=1 + 5 * i, ignore_eos=i == 6, **more)
        requests.append(Request(id=str(i), prompt_token_ids=tuple(range(3 + i, 20 + 3 * i)), params=params))
    return requests


def make_pair(model: TinyModel, shape: Shape = SHAPE) -> tuple[Engine, Engine]:
    """Return an engine in step, without the CPU's own decoder, and one that runs ahead."""
    engines = []
    for ahead in (False, True):
        engine = make_engine(model("qwen3"), shape, fast_path=False)
        if ahead:
            engine._runner.run_ahead(shape.eos)
        engines.append(engine)
    return engines[0], engines[1]


def assert_same_cache(one: Engine, other: Engine, request_id: str) -> None:
    assert one.kept.seen(request_id) == other.kept.seen(request_id)
    assert one.kept.positions(request_id) == other.kept.positions(request_id)


def test_running_ahead_changes_no_token(tiny_model: TinyModel) -> None:
    """Catches a token fed twice or after an end, one taken back there, a row told wrongly, a draw too many."""
    in_step, ahead = make_pair(tiny_model, replace(SHAPE, eos=EOS))
    want = run(in_step, make_requests())
    assert any(len(ids) < 1 + 5 * int(i) for i, ids in want.items()), "no request ends early"
    cache = ahead._runner.cache
    with mock.patch.object(cache, "undo_decode", wraps=cache.undo_decode) as undo:
        assert run(ahead, make_requests()) == want
    assert not undo.called  # nothing was fed behind an end


def test_positions_given_anew_change_no_token(tiny_model: TinyModel) -> None:
    """Catches a step that was fed ahead at a position past the model's, or at one from before they were given anew."""
    shape = replace(SHAPE, eos=EOS, rebases=True)
    in_step, ahead = make_pair(lambda family: tiny_model(family, max_position_embeddings=48), shape)
    requests = [greedy(str(i), range(3, 20 + 3 * i), 90 + i, keep=i == 1) for i in range(3)]
    loop: Any = ahead._runner._ahead
    step, waited = loop.step, []
    loop.step = lambda rows, *, in_step: (waited.append(in_step), step(rows, in_step=in_step))[1]
    assert run(ahead, requests) == run(in_step, requests)
    assert_same_cache(in_step, ahead, "1")
    assert 3 <= sum(waited) < 30  # the others ran ahead


def test_a_conversation_goes_on_where_it_ended(tiny_model: TinyModel) -> None:
    """Catches slots that were evicted for a token after the last one."""
    in_step, ahead = make_pair(tiny_model, replace(SHAPE, eos=EOS))
    for engine in (in_step, ahead):
        run(engine, [greedy("a", range(3, 40), 20, keep=True), greedy("b", range(9, 30), 9, keep=True)])
    for name in "ab":
        assert_same_cache(in_step, ahead, name)
    turns = [run(engine, [greedy("c", (5, 6), 9, continues="a", keep=True)]) for engine in (in_step, ahead)]
    assert turns[0] == turns[1]
    assert_same_cache(in_step, ahead, "c")


def test_what_the_host_stops_is_taken_back(tiny_model: TinyModel) -> None:
    """Catches the step that had run ahead of a stop."""
    engines = make_pair(tiny_model)
    for engine in engines:
        engine.add(greedy("a", range(3, 40), 30, keep=True))
        tokens = 0
        while tokens < 6:
            tokens += sum(len(event.token_ids) for event in engine.step())
        engine.stop("a")
    assert_same_cache(*engines, "a")
    assert len({str(run(engine, [greedy("c", (5, 6), 9, continues="a")])) for engine in engines}) == 1


def test_rows_that_have_to_wait_are_taken_back(tiny_model: TinyModel) -> None:
    """Catches a token lost when fewer rows decode than had run ahead, and a resize under a step on its way."""
    outputs = []
    for engine in make_pair(tiny_model):
        tokens: dict[str, list[int]] = {}
        for request in make_requests()[:4]:
            engine.add(request)
        for step in range(100):
            if step == 8:
                engine._scheduler.narrow(1)
            for event in engine.step() if engine.has_work else ():
                tokens.setdefault(event.request_id, []).extend(event.token_ids)
        outputs.append(tokens)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("failing", [3, 4, 9])
def test_running_out_of_memory_ahead_loses_nothing(failing: int, tiny_model: TinyModel) -> None:
    """Catches a token lost, or an eviction left behind, when a step that ran ahead had to be undone."""
    in_step, ahead = make_pair(tiny_model)
    want = run(in_step, make_requests())
    loop: Any = ahead._runner._ahead
    forward, calls = loop._device._forward, []

    def failing_forward(*arguments: Any) -> torch.Tensor:
        logits: torch.Tensor = forward(*arguments)
        calls.append(1)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits

    loop._device._forward = failing_forward
    assert run(ahead, make_requests()) == want


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_graphs_decode_as_the_operations_do(tiny_model: TinyModel) -> None:
    """Catches a graph that reads old memory, feeds while it is captured, or serves another number of rows."""
    outputs = []
    for graphs in (False, True):
        engine = make_engine(tiny_model("qwen3").cuda(), SHAPE)
        if not graphs:
            engine._runner._ahead = None
        outputs.append(run(engine, make_requests()))
        engine.resize(12)
        outputs.append(run(engine, make_requests()))
    assert outputs[:2] == outputs[2:]
