"""Mistakes in what an engine says of itself while it works: the live panel's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from helpers.engines import Shape, greedy, make_engine

TinyModel = Callable[..., Any]
PROMPT = range(3, 90)  # 87 tokens


def test_reading_counts_what_is_left_of_the_prompts(tiny_model: TinyModel) -> None:
    """Catches an estimate that forgets prompts that wait, or counts those that were read."""
    engine = make_engine(tiny_model("qwen3"), Shape(kv_budget=16, rows=1, prefill_chunk=32, gate="random"))
    assert (engine.reading, engine.snapshot(), engine.first_token_s, engine.evicted) == ((0, 0), None, None, 0)
    engine.add(greedy("a", PROMPT, 3))
    engine.add(greedy("b", PROMPT, 3))
    engine.step()
    assert engine.reading == (32, 2 * 87)
    assert engine.first_token_s is None
    assert engine.evicted == 3 * 2 * (32 - 16)  # layers · heads · (seen − kept)
    engine.step()
    engine.step()
    assert engine.reading[1] == 87
    assert engine.first_token_s is not None


def test_evictions_are_summed_over_requests_that_have_ended(tiny_model: TinyModel) -> None:
    """Catches a count that falls when a row is freed, and one that counts a row twice."""
    engine = make_engine(tiny_model("qwen3"), Shape(kv_budget=16, rows=2, gate="random"))
    counts, ended = [], 0
    for index in range(3):
        engine.add(greedy(str(index), PROMPT, 2 + index))
    while engine.has_work:
        ended += sum(event.stats.cache.evicted for event in engine.step() if event.stats is not None)
        counts.append(engine.evicted)
    assert counts == sorted(counts)
    assert counts[-1] == ended == 3 * 2 * sum(87 + (2 + index - 1) - 16 for index in range(3))


def test_a_snapshot_is_of_the_row_that_runs(tiny_model: TinyModel) -> None:
    """Catches a look at another row, or at what it held before."""
    engine = make_engine(tiny_model("qwen3"), Shape(kv_budget=16, rows=2, gate="random"))
    engine.add(greedy("a", PROMPT, 9))
    engine.step()
    first = engine.snapshot()
    engine.step()
    second = engine.snapshot()
    assert first is not None
    assert second is not None
    assert (first.kept_per_head, first.slots, len(first.horizons), len(first.horizons[0])) == (16, 16, 3, 2)
    assert second.seen_tokens == first.seen_tokens + 1
    assert abs(sum(second.shares) * second.seen_tokens / len(second.shares) - 16) < 1
