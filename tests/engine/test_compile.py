"""Compiled decode steps: one graph, and the tokens of the steps as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from helpers.engines import Shape, greedy, make_engine, run
from trimkv_cli.engine.cpu import compiling
from trimkv_cli.errors import UsageError
from trimkv_cli.loading.options import EngineOptions

PROMPTS = (range(3, 9), range(20, 60), range(5, 70))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_one_graph_decodes_every_position(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a break or a second graph: for a fill that grows, rows that come and go, positions as numbers."""
    whole: Any = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **how: whole(step, backend="aot_eager", **how))
    torch._dynamo.reset()
    counters.clear()
    requests = [greedy(str(i), prompt, 12 + 9 * i) for i, prompt in enumerate(PROMPTS)]
    shape = Shape(kv_budget=24, gate="random", rows=2)
    want = run(make_engine(tiny_model("qwen3"), shape), requests)
    engine = make_engine(tiny_model("qwen3"), shape, compiled=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert run(engine, requests) == want
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.filterwarnings("ignore")
def test_every_engine_and_size_has_a_graph_of_its_own(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an engine that runs the graph of another, or of the size that its cache had before."""
    whole: Any = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **how: whole(step, **{**how, "backend": "aot_eager"}))
    torch._dynamo.reset()
    counters.clear()
    shapes = [Shape(kv_budget=budget, gate="random", rows=1) for budget in (24, 16)]
    requests = [greedy("a", PROMPTS[1], 12)]
    wants = [run(make_engine(tiny_model("qwen3"), shape), requests) for shape in shapes]
    assert wants[0] != wants[1]
    engines = [make_engine(tiny_model("qwen3"), shape, compiled=True) for shape in shapes]
    assert [run(engine, requests) for engine in (*engines, *engines)] == [*wants, *wants]
    engines[0].resize(16)
    assert run(engines[0], requests) == wants[1]
    assert counters["stats"]["unique_graphs"] == 3


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.filterwarnings("ignore")
def test_compiled_code_gives_the_same_tokens(tiny_model: Callable[..., Any], rows: int) -> None:
    """Catches code that the compiler makes otherwise than the operations say."""
    torch._dynamo.reset()
    requests = [greedy(str(row), range(3 + row, 40), 24) for row in range(rows)]
    shape = Shape(kv_budget=24, gate="random", rows=rows)
    want = run(make_engine(tiny_model("qwen3", num_hidden_layers=1), shape), requests)
    assert run(make_engine(tiny_model("qwen3", num_hidden_layers=1), shape, compiled=True), requests) == want


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback out of torch where there is no compiler."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler"):
        compiling.compile_step(run)


def test_what_cannot_be_compiled_is_refused(tiny_model: Callable[..., Any]) -> None:
    """Catches an option that is silently without effect."""
    with pytest.raises(UsageError, match="--compile"):
        make_engine(tiny_model("gemma3"), Shape(gate="random"), compiled=True)
    with pytest.raises(UsageError, match="--deterministic"):
        EngineOptions(compile=True, deterministic=True)
