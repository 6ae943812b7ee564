"""What of a measurement is a prefill's time, a decode's, or nobody's."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from trimkv_cli.bench import speed
from trimkv_cli.bench.shapes import Network, find_shape, random_network
from trimkv_cli.bench.speed import Case, SpeedOptions, make_prompts, run_own
from trimkv_cli.engine.model_runner import ModelRunner
from trimkv_cli.engine.scheduler import Prefill
from trimkv_cli.loading.options import EngineOptions

CASE = Case(context=1000, rows=2, kv_budget=8)  # one row's second chunk is read while the other decodes


@pytest.fixture(scope="module")
def network() -> Network:
    shape = find_shape("10m")
    small = {**shape.config, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    small |= {"num_attention_heads": 2, "head_dim": 16}
    return random_network(replace(shape, config=small), EngineOptions(device="cpu", dtype="fp32"))


class Clock:
    """Time that passes where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, first: float) -> None:
        self.now = 0.0
        self.queued = 0.0  # what a GPU still has to compute
        costs = iter([first])
        run = ModelRunner.run

        def timed(runner: ModelRunner, batch: Any) -> Any:
            if isinstance(batch, Prefill):
                self.queued += 1.0 + next(costs, 0.0)
            else:
                self.now, self.queued = self.now + self.queued + 100.0, 0.0
            return run(runner, batch)

        def wait(_: torch.device) -> None:
            self.now, self.queued = self.now + self.queued, 0.0

        monkeypatch.setattr(ModelRunner, "run", timed)
        monkeypatch.setattr(speed, "wait_for", wait)
        monkeypatch.setattr(speed.time, "perf_counter", lambda: self.now)


@pytest.mark.parametrize("warm_up", [False, True])
def test_a_prefill_is_the_time_of_all_its_chunks_and_of_no_decode(
    warm_up: bool, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches chunks that a GPU computes while the host waits for a decode, decodes in between, and a compilation."""
    Clock(monkeypatch, first=5000.0)
    prompts = make_prompts(network, CASE)
    timing = run_own(network, CASE, SpeedOptions(warm_up=warm_up), prompts)
    assert timing.prefill_s == (4.0 if warm_up else 5004.0)
    assert timing.ttft_s == timing.prefill_s - 2
    assert timing.step_s == [100.0] * 64


def test_an_engine_before_is_gone_before_the_next_is_made(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cache that lies in the peak of the next case."""
    make, made, alive = speed.make_engine, list[Any](), list[bool]()

    def spied(*arguments: Any) -> Any:
        alive.extend(engine() is not None for engine in made)
        engine = make(*arguments)
        made.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(speed, "make_engine", spied)
    case = Case(context=4, rows=1, kv_budget=8)
    gc.disable()
    try:
        for _ in range(2):
            run_own(network, case, SpeedOptions(), make_prompts(network, case))
    finally:
        gc.enable()
    assert alive == [False]
