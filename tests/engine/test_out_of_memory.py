"""Steps that run out of memory anywhere: they are undone and tried again, and nobody else notices."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.engines import Shape, greedy, make_engine
from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.scheduler import Decode, Limit, Prefill, Row
from trimkv_cli.errors import is_out_of_memory
from trimkv_cli.events import TokenEvent
from trimkv_cli.request import Request, SamplingParams

TinyModel = Callable[..., Any]
SYSTEM = tuple(range(20, 33))


class FailAt(TorchDispatchMode):
    """Raise at the k-th operation of torch that may allocate, before it is done; count them all."""

    in_place = (torch.ops.aten.copy_.default, torch.ops.aten.index_copy_.default, torch.ops.aten.scatter_.src)

    def __init__(self, *failing: int) -> None:
        super().__init__()
        self.failing = set(failing)
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.in_place:
            return func(*args, **(kwargs or {}))
        self.count += 1
        if self.count - 1 in self.failing:
            raise torch.OutOfMemoryError("injected: out of memory")
        return func(*args, **(kwargs or {}))


def requests() -> list[Request]:
    """Greedy and sampled ones, with penalties, a shared system message, long and short."""
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    ]
    return [
        Request(
            id=str(i),
            prompt_token_ids=(*SYSTEM, *range(40 + i, 46 + 3 * i)),
            prefix_len=len(SYSTEM),
            params=SamplingParams(max_tokens=3 + i, seed=i, **ways[i % 3]),
            keep=i == 4,
        )
        for i in range(5)
    ]


def finish(engine: Engine, asked: Iterable[Request]) -> tuple[dict[str, list[int]], dict[str, TokenEvent]]:
    tokens: dict[str, list[int]] = {}
    last: dict[str, TokenEvent] = {}
    for event in engine.generate(asked):
        tokens.setdefault(event.request_id, []).extend(event.token_ids)
        if event.finish_reason is not None:
            last[event.request_id] = event
    return tokens, last


def is_idle(engine: Engine) -> bool:
    scheduler = engine._scheduler
    return not (engine.has_work or engine._states or scheduler.running or scheduler.suspended)


@pytest.fixture(scope="module")
def undisturbed() -> dict[Any, tuple[dict[str, list[int]], Any, int]]:
    return {}


@pytest.mark.parametrize(("family", "deterministic"), [("qwen3", True), ("qwen3", False), ("qwen3_5_text", False)])
@settings(max_examples=12, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_out_of_memory_at_any_operation_changes_no_token(
    family: str, deterministic: bool, data: st.DataObject, undisturbed: dict[Any, Any], tiny_model: TinyModel
) -> None:
    """Catches half-done evictions and states, sampler steps taken twice, prefixes copied in part, rows never freed."""
    shape = Shape(kv_budget=11, rows=3, prefill_chunk=8, gate="random", deterministic=deterministic)
    model = tiny_model(family)
    if (family, deterministic) not in undisturbed:
        engine = make_engine(model, shape)
        with FailAt() as counting:
            tokens, _ = finish(engine, requests())
        undisturbed[family, deterministic] = tokens, engine.kept.positions("4"), counting.count
        engine.close()
    tokens, kept, operations = undisturbed[family, deterministic]
    failing = data.draw(st.sets(st.integers(0, operations - 1), min_size=1, max_size=3))
    engine = make_engine(model, shape)
    with FailAt(*failing):
        got, last = finish(engine, requests())
    engine.close()
    whole = {key for key, event in last.items() if event.finish_reason != "error"}
    assert len(whole) == 5 or len(failing) > 1
    assert last.keys() == tokens.keys()
    assert {key: got[key] for key in whole} == {key: tokens[key] for key in whole}
    if "4" in whole:
        assert engine.kept.positions("4") == kept
        engine.kept.release("4")
    assert is_idle(engine)
    assert {row.index for row in engine._scheduler.parked.values()} == set()


def break_when(engine: Engine, broken: Callable[[Prefill | Decode], bool]) -> None:
    """Run out of memory after the forward of every batch for which `broken` holds."""
    run = engine._runner.run

    def failing(batch: Prefill | Decode) -> list[tuple[Row, int]]:
        done = run(batch)
        if broken(batch):
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory")
        return done

    engine._runner.run = failing  # type: ignore[method-assign]


def test_a_decode_too_large_goes_on_with_half_the_rows(tiny_model: TinyModel) -> None:
    """Catches requests dropped or begun anew when only their number was the trouble."""
    shape = Shape(kv_budget=11, rows=4, prefill_chunk=8, gate="random")
    asked = [greedy(str(i), range(30 + i, 50 + i), 9) for i in range(6)]
    want, _ = finish(make_engine(tiny_model("qwen3"), shape), asked)
    engine = make_engine(tiny_model("qwen3"), shape)
    break_when(engine, lambda batch: isinstance(batch, Decode) and len(batch.rows) > 1)
    got, last = finish(engine, asked)
    assert got == want
    assert {event.finish_reason for event in last.values()} == {"length"}
    assert engine.stats.undone_steps >= 1
    assert engine.stats.prefill_tokens == sum(len(request.prompt_token_ids) for request in asked)
    assert is_idle(engine)


def test_a_shortage_that_passes_costs_no_rows_for_good(tiny_model: TinyModel) -> None:
    """Catches a job that runs at half its rows, or reads one prompt at a time, to its end after one bad moment."""
    shape = Shape(kv_budget=11, rows=4, prefill_chunk=8, gate="random")
    asked = [greedy(str(i), (30 + i, 31 + i), 40) for i in range(12)]
    want, _ = finish(make_engine(tiny_model("qwen3"), shape), asked)
    engine = make_engine(tiny_model("qwen3"), shape)
    scheduler = engine._scheduler
    scheduler.row_limit.patience, scheduler.prefill_rows.patience = 6, 1
    widths: dict[type, list[int]] = {Prefill: [], Decode: []}

    def is_short(batch: Prefill | Decode) -> bool:
        width = len(batch.rows) if isinstance(batch, Decode) else len(batch.chunks)
        widths[type(batch)].append(width)
        return width > 1 and len(widths[type(batch)]) <= 2

    break_when(engine, is_short)
    assert finish(engine, asked)[0] == want
    assert min(widths[Decode]) < max(widths[Decode][10:]) == 4
    assert scheduler.row_limit.now == scheduler.prefill_rows.now == 4
    assert engine.stats.undone_steps >= 2
    assert is_idle(engine)


def test_what_never_fits_is_tried_ever_more_seldom() -> None:
    """Catches a step undone every few tokens where memory is short for good, and a caution that outlives its reason."""
    limit = Limit(8)
    tried = []
    for step in range(2000):
        if limit.now > 4:
            limit.narrow(4)
            tried.append(step)
        limit.passed()
    assert len(tried) == pytest.approx(6, abs=1)
    gaps = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert all(later >= 1.9 * earlier for earlier, later in itertools.pairwise(gaps))
    for _ in range(2 * 8 * limit.patience):
        limit.passed()
    assert (limit.now, limit.patience) == (8, Limit(8).patience)


def test_a_prefill_too_large_is_split_by_rows_and_then_by_chunks_with_a_note(tiny_model: TinyModel) -> None:
    """Catches a changed chunk that nobody is told of, and a chunk changed where fewer rows would have done."""
    shape = Shape(kv_budget=150, rows=3, prefill_chunk=256, gate="random")
    asked = [greedy(str(i), [3 + (i + n) % 90 for n in range(40 if i else 300)], 4) for i in range(3)]

    def tokens(batch: Prefill | Decode) -> int:
        return 0 if isinstance(batch, Decode) else sum(len(chunk.token_ids) for chunk in batch.chunks)

    engine = make_engine(tiny_model("qwen3"), shape)
    break_when(engine, lambda batch: tokens(batch) > 128)
    got, last = finish(engine, asked)
    chunks = {key: event.stats.prefill_chunk for key, event in last.items() if event.stats}
    assert chunks == {"0": 128, "1": None, "2": None}
    assert last["0"].stats is not None
    assert [warning.code for warning in last["0"].stats.warnings] == ["prefill_chunk_reduced"]
    smaller = make_engine(tiny_model("qwen3"), Shape(kv_budget=150, rows=1, prefill_chunk=128, gate="random"))
    assert finish(smaller, asked)[0] == got


def test_what_cannot_run_alone_fails_alone(tiny_model: TinyModel) -> None:
    """Catches a job that ends with the one request that there is no memory for."""
    shape = Shape(kv_budget=11, rows=4, prefill_chunk=8, gate="random")
    asked = [greedy(str(i), range(30 + i, 50 + i), 9, keep=i == 2) for i in range(6)]
    want, _ = finish(make_engine(tiny_model("qwen3"), shape), asked)
    engine = make_engine(tiny_model("qwen3"), shape)

    def reaches_the_fifth_token_of_2(batch: Prefill | Decode) -> bool:
        rows = batch.rows if isinstance(batch, Decode) else ()
        return any(row.request.id == "2" and len(row.output) == 4 for row in rows)

    break_when(engine, reaches_the_fifth_token_of_2)
    got, last = finish(engine, asked)
    assert (last["2"].finish_reason, last["2"].error_code) == ("error", "out_of_memory")
    assert "memory" in (last["2"].error or "")
    assert got.pop("2") == want.pop("2")[:4]
    assert got == want
    assert engine.kept.seen("2") == 20 + 3  # as it was before the step that failed
    engine.kept.release("2")
    assert is_idle(engine)


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(tiny_model: TinyModel) -> None:
    """Catches a chat whose cache holds half a turn after a prefill ran out of memory."""
    shape = Shape(kv_budget=11, rows=1, prefill_chunk=8, gate="random")
    first, second = greedy("1", range(30, 60), 6, keep=True), range(60, 90)
    calm, engine = make_engine(tiny_model("qwen3"), shape), make_engine(tiny_model("qwen3"), shape)
    for each in (calm, engine):
        finish(each, [first])
    want, _ = finish(calm, [greedy("2", second, 6, keep=True, continues="1")])
    before = engine.kept.positions("1")
    broken = [True]
    break_when(engine, lambda batch: isinstance(batch, Prefill) and broken[0] and batch.chunks[0].last)
    _, last = finish(engine, [greedy("2", second, 6, keep=True, continues="1")])
    assert last["2"].error_code == "out_of_memory"
    assert (engine.kept.positions("1"), engine.kept.seen("1")) == (before, 35)
    broken[0] = False
    assert finish(engine, [greedy("3", second, 6, keep=True, continues="1")])[0]["3"] == want["2"]


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    """Catches a bug in a kernel that is retried for ever as if memory were short."""
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(ValueError("what is out of memory?"))
    assert not is_out_of_memory(OSError(errno.ENOENT, "out of memory.json"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
