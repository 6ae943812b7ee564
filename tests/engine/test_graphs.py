"""Graphs of decode steps, with what torch has for them replaced: no GPU is needed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from helpers import tiny_tokenizers
from helpers.engines import LONG_ROPE, Shape, as_on_a_gpu, greedy, make_engine, run
from trimkv_cli.commands.answers import say_warnings
from trimkv_cli.engine.ahead import Ahead
from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.graphs import Graphs
from trimkv_cli.engine.model_runner import ModelRunner
from trimkv_cli.engine.sampler import Form
from trimkv_cli.engine.text import Text
from trimkv_cli.errors import is_out_of_memory
from trimkv_cli.events import Answer, TokenEvent
from trimkv_cli.request import Request, SamplingParams

TinyModel = Callable[..., Any]
SHAPE = Shape(kv_budget=16, gate="random", rows=3, prefill_chunk=16)
BROKEN = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: operation failed due to a previous error during capture\nCUDA kernel errors might"),
)


@dataclass
class Gpu:
    """What a process asked of torch.cuda for its graphs."""

    stream: Any = "main"  # the current one
    streams: list[Any] = field(default_factory=list)
    captured_on: list[tuple[Any, Any]] = field(default_factory=list)  # stream and pool of each capture
    forwards: list[tuple[str, Any, int]] = field(default_factory=list)  # how, on which stream, for how many rows
    capturing: Any = None
    replaying: bool = False
    replays: int = 0  # of forwards
    reset: int = 0
    alive: Any = field(default_factory=weakref.WeakSet)  # the graphs that were captured
    failure: Exception | None = None  # of the next capture's end


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Record a forward while a graph is captured, and run it again in place of the graph."""
    state = Gpu()
    pools = iter(range(1000))

    class Graph:
        def __init__(self) -> None:
            self.steps: list[Callable[[], torch.Tensor]] = []
            self.made: list[torch.Tensor] = []

        def replay(self) -> None:
            state.replaying = True
            for step, made in zip(self.steps, self.made, strict=True):
                made.copy_(step())
            state.replaying = False

        def reset(self) -> None:
            state.reset += 1
            self.steps.clear()

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        before, state.stream = state.stream, stream
        yield
        state.stream = before

    @contextmanager
    def on_stream(stream: Any) -> Iterator[None]:
        before, state.stream = state.stream, stream
        try:
            yield
        finally:
            state.stream = before

    @contextmanager
    def graph(graph: Graph, pool: Any, stream: Any) -> Iterator[None]:
        state.captured_on.append((stream, pool))
        state.capturing = graph
        with on(stream):  # as torch's: where a capture fails to end, its stream stays the current one
            yield
            state.capturing = None
            state.alive.add(graph)
            failure, state.failure = state.failure, None
            if failure is not None:
                raise type(failure)(*failure.args)  # whose frames go with it

    def new_stream() -> Stream:
        state.streams.append(Stream())
        return state.streams[-1]

    here = lambda: state.stream if isinstance(state.stream, Stream) else Stream()  # noqa: E731
    cuda = {"CUDAGraph": Graph, "Stream": new_stream, "stream": on_stream, "graph": graph, "current_stream": here}
    cuda |= {"graph_pool_handle": lambda: next(pools), "synchronize": lambda: None}
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    forward, capture = ModelRunner._forward_static, Graphs._capture

    def captured(self: Graphs, run: Callable[[], torch.Tensor]) -> Any:
        def kept() -> torch.Tensor:
            made = run()
            if state.capturing is not None:
                state.capturing.steps.append(run)
                state.capturing.made.append(made)
            return made

        return capture(self, kept)

    def recorded(self: ModelRunner, ids: Any, position: Any, count: int) -> torch.Tensor:
        if state.replaying:
            state.replays += 1
            return forward(self, ids, position, count)
        how = "capture" if state.capturing is not None else "warm-up" if (position < 0).all() else "eager"
        state.forwards.append((how, state.stream, count))
        return forward(self, ids, position, count)

    monkeypatch.setattr(Graphs, "_capture", captured)
    monkeypatch.setattr(ModelRunner, "_forward_static", recorded)
    return state


def graphed(model: Any, shape: Shape = SHAPE, text: Text | None = None, *, fast_path: bool = False) -> Engine:
    """Return an engine that decodes as on a GPU."""
    engine = make_engine(model, shape, text=text, fast_path=fast_path)
    runner, device = engine._runner, engine._runner.device
    runner.device = torch.device("cuda")
    runner.run_ahead(shape.eos)
    runner.device = device
    return engine


def asked(count: int = 3) -> list[Any]:
    return [greedy(str(i), range(3 + i, 20 + 3 * i), 6 + 3 * i) for i in range(count)]


def test_each_engine_captures_on_one_stream_of_its_own(gpu: Gpu, tiny_model: TinyModel) -> None:
    """Catches a workspace for each number of rows, and one that another engine's graphs write to or have lost."""
    model = tiny_model("qwen3")
    want = run(make_engine(model, SHAPE, fast_path=False), asked())
    used: list[Any] = []
    for _ in range(2):
        gpu.captured_on.clear()
        gpu.forwards.clear()
        engine = graphed(model)
        assert run(engine, asked()) == want
        assert len({count for _, _, count in gpu.forwards}) == 3
        assert len(gpu.captured_on) == 6  # each with its choice of greedy tokens
        (where,) = {*gpu.captured_on, *((stream, gpu.captured_on[0][1]) for _, stream, _ in gpu.forwards)}
        used.append(where)
        engine.close()
    assert used[0][0] is not used[1][0]
    assert used[0][1] != used[1][1]


def test_nothing_of_a_closed_engine_lives(gpu: Gpu, tiny_model: TinyModel) -> None:
    """Catches graphs and a cache that stay until garbage is collected, which may be while another engine captures."""
    engine = graphed(tiny_model("qwen3"))
    run(engine, asked())
    graphs, parts = len(gpu.alive), [weakref.ref(part) for part in (engine._runner, engine._runner._graphs)]
    slots = weakref.ref(engine._runner.cache.layers[0].slots.key)
    gc.disable()
    try:
        engine.close()
        assert (gpu.reset, len(gpu.alive)) == (graphs, 0)
        assert parts[1]() is None
        del engine
        assert (parts[0](), slots()) == (None, None)
    finally:
        gc.enable()


def test_fused_steps_are_captured(gpu: Gpu, tiny_model: TinyModel) -> None:
    """Catches a graph of the modules where there is a decoder, and one that reads slots from before a resize."""
    requests = asked()
    results = []
    for fused in (False, True):
        with as_on_a_gpu() if fused else nullcontext():
            engine = graphed(tiny_model("gemma3"), fast_path=fused)
        said = [run(engine, requests)]
        engine.resize(12)
        said.append(run(engine, requests))
        assert (len(gpu.alive) > 0, engine._runner._decoder is not None) == (True, fused)
        results.append(said)
        engine.close()
    assert results[1] == results[0]


def test_slots_that_lie_elsewhere_are_captured_anew(gpu: Gpu, tiny_model: TinyModel) -> None:
    """Catches a graph that reads slots from before a change of their number, and its memory, kept beside the new."""
    model = tiny_model("qwen3")
    in_step, engine = make_engine(model, SHAPE, fast_path=False), graphed(tiny_model("qwen3"))
    for each in (in_step, engine):
        run(each, asked())
        each.resize(12)
    assert (gpu.reset, len(gpu.alive)) == (6, 0)
    assert run(engine, asked()) == run(in_step, asked())
    assert len({pool for _, pool in gpu.captured_on}) == 2


@pytest.mark.parametrize("failure", BROKEN, ids=["out of memory", "broken off"])
def test_a_capture_that_fails_costs_no_request(
    failure: Exception, gpu: Gpu, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches rows that count as empty from then on, a request given up, and a capture tried at every step."""
    want = run(make_engine(tiny_model("qwen3"), SHAPE, fast_path=False), asked())
    engine = graphed(tiny_model("qwen3"))
    gpu.failure = failure
    answers = {request.id: Answer(request) for request in asked()}
    for event in engine.generate(asked()):
        answers[event.request_id].take(event)
    assert {key: answer.token_ids for key, answer in answers.items()} == want
    assert gpu.stream == "main"
    eager = {count for how, _, count in gpu.forwards if how == "eager"}
    captured = [count for how, _, count in gpu.forwards if how == "capture"]
    assert len(eager) == 1
    assert captured.count(*eager) == 1  # tried once
    assert len(captured) > 1  # others have graphs
    assert {len(answer.stats.warnings) for answer in answers.values()} == {1}
    (warning,) = answers["0"].stats.warnings
    assert warning.code == "no_graph"
    assert warning.message.endswith(str(failure).splitlines()[0])
    say_warnings(answers["0"])
    assert capsys.readouterr().err == f"warning: {warning.message}\n"
    assert engine.stats.undone_steps == 0


def test_a_failing_graph_takes_those_of_its_stream_with_it(gpu: Gpu, tiny_model: TinyModel) -> None:
    """Catches a graph that multiplies in a workspace which torch freed with a failed capture on the same stream."""
    engine = graphed(tiny_model("qwen3"))
    run(engine, asked(1))
    first = gpu.captured_on[-1]
    gpu.failure = BROKEN[0]
    run(engine, asked(2))
    run(engine, asked(1))
    assert gpu.captured_on[-1][0] is not first[0]
    assert gpu.captured_on[-1][1] != first[1]
    assert len(gpu.alive) == 2


def test_memory_that_cannot_be_pinned_counts_as_short() -> None:
    """Catches an allocation by CUDA itself, which says so in its message alone, taken for a fault of the program."""
    assert is_out_of_memory(torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"))


@contextmanager
def counted_decodes(model: Any) -> Iterator[list[None]]:
    """Count the forwards that feed one token to each row."""
    forwards: list[None] = []

    def count(_: Any, args: tuple[Any, ...]) -> None:
        if args[0].shape[1] == 1:
            forwards.append(None)

    hook = model.get_input_embeddings().register_forward_pre_hook(count)
    yield forwards
    hook.remove()


def assert_only_graphs(gpu: Gpu, forwards: list[None]) -> None:
    assert {how for how, _, _ in gpu.forwards} == {"warm-up", "capture"}
    assert len(forwards) == len(gpu.forwards) + gpu.replays


def events_of(engine: Engine, requests: list[Request]) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    for event in engine.generate(requests):
        events.setdefault(event.request_id, []).append(event)
    return events


def test_no_row_costs_the_others_their_graph(gpu: Gpu, tiny_model: TinyModel) -> None:
    """Catches a step without a graph, tokens behind a stop in the cache, and a choice before the host was asked."""
    text = Text(tiny_tokenizers.chatml())
    model = tiny_model("qwen3", vocab_size=len(text.tokenizer))
    shape = replace(SHAPE, rows=6, eos=frozenset({text.tokenizer.eos_token_id}))
    in_step = make_engine(model, shape, text=text, fast_path=False)
    plain = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    said = "".join(
        event.text for event in events_of(in_step, [Request(id="", prompt_token_ids=(5, 9), params=plain)])[""]
    )
    thinks = tuple(text._encode("<|im_start|>assistant\n<think>\n"))
    digits = "%llguidance {}\nstart: /[0-9]{9}/"
    kinds: dict[str, tuple[tuple[int, ...], SamplingParams]] = {
        "stop": ((5, 9), replace(plain, stop=(said[-3:],))),
        "logprobs": ((7, 3), replace(plain, logprobs=2, max_tokens=40)),
        "digits": ((8, 4), replace(plain, ignore_eos=False, grammar=digits)),
        "thinks": (thinks, replace(plain, think_budget=4)),
        "greedy": ((6, 2), replace(plain, max_tokens=30)),
        "sampled": ((3, 4), replace(plain, temperature=1.5, seed=4)),
    }
    requests = [Request(id=id_, prompt_token_ids=ids, params=how, keep=True) for id_, (ids, how) in kinds.items()]
    want = events_of(in_step, requests)
    engine = graphed(model, shape, text)
    ahead: Any = engine._runner._ahead
    launch, waiting = ahead._launch_ahead, []
    ahead._launch_ahead = lambda rows: (waiting.extend(row.request.id for row in rows), launch(rows))[1]
    with counted_decodes(model) as forwards:
        got = events_of(engine, requests)
    assert_only_graphs(gpu, forwards)
    assert {"stop", "logprobs", "greedy", "sampled", "thinks"} == set(waiting)
    for name, events in want.items():
        assert [event.token_ids for event in got[name]] == [event.token_ids for event in events]
        assert "".join(event.text for event in got[name]) == "".join(event.text for event in events)
        assert engine.kept.seen(name) == in_step.kept.seen(name)
        assert engine.kept.positions(name) == in_step.kept.positions(name)
    assert got["stop"][-1].finish_reason == "stop"
    for one, other in zip(got["logprobs"], want["logprobs"], strict=True):
        assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=1e-4)
        assert [token for token, _ in one.logprobs[0].top] == [token for token, _ in other.logprobs[0].top]


def test_factors_of_rope_change_under_a_graph(gpu: Gpu, tiny_model: TinyModel) -> None:
    """Catches factors that a graph has taken for good, and rows of one kind that a step of the other kind feeds."""
    asked = [greedy("a", range(3, 20), 30), greedy("long", range(3, 80), 12), greedy("b", range(5, 9), 20)]
    asked.append(greedy("longer", range(9, 50), 30))
    want = run(make_engine(tiny_model("phi3", **LONG_ROPE), SHAPE, fast_path=False), asked)
    model = tiny_model("phi3", **LONG_ROPE)
    with counted_decodes(model) as forwards:
        assert run(graphed(model), asked) == want
    assert_only_graphs(gpu, forwards)


def test_new_positions_reach_a_graph(gpu: Gpu, tiny_model: TinyModel) -> None:
    """Catches a step without a graph where positions are given anew, and a graph that shows the model the old ones."""
    shape = replace(SHAPE, rebases=True)
    asked = [greedy(str(i), range(3, 21 + 3 * i), 90 + i) for i in range(2)]
    model = tiny_model("qwen3", max_position_embeddings=48)
    want = run(make_engine(model, shape, fast_path=False), asked)
    engine = graphed(model, shape)
    with counted_decodes(model) as forwards:
        assert run(engine, asked) == want
    assert_only_graphs(gpu, forwards)


def test_tokens_are_chosen_in_graphs(gpu: Gpu, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a choice that goes through the host, a draw that rows beside it shift, and a form that skips a stage."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.5, "seed": 4},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "seed": 5},
        {"temperature": 1.2, "min_p": 0.02, "seed": 6},
        {"top_h": 0.7, "seed": 7},
        {"temperature": 1.1, "repetition_penalty": 1.3, "seed": 8, "max_tokens": 6},
    ]
    asked = [
        Request(
            id=str(i), prompt_token_ids=tuple(range(3, 9 + i)), params=SamplingParams(**{"max_tokens": 8 + 5 * i} | how)
        )
        for i, how in enumerate(kinds)
    ]
    want = run(make_engine(tiny_model("qwen3"), SHAPE, fast_path=False), asked)
    engine, called, choose = graphed(tiny_model("qwen3")), [], Ahead._choose
    monkeypatch.setattr(Ahead, "_choose", lambda self, *given: (called.append(1), choose(self, *given))[1])
    assert run(engine, asked) == want
    forms = {key[0] for key in engine._runner._graphs or () if isinstance(key, tuple)}
    assert forms == {Form.DRAWN, Form.FILTERED, Form.ENTROPY}  # a greedy row is never alone
    assert len(called) == 5  # beside a penalty


def test_a_choice_without_a_graph_costs_no_forward(gpu: Gpu, tiny_model: TinyModel) -> None:
    """Catches a forward without a graph, and a wrong token, where only the choice of tokens cannot be captured."""
    params = SamplingParams(max_tokens=9, temperature=1.3, top_k=7, seed=1)
    sampled = [Request(id="", prompt_token_ids=(5, 9), params=params)]
    want = run(make_engine(tiny_model("qwen3"), SHAPE, fast_path=False), sampled)
    model = tiny_model("qwen3")
    engine, replay = graphed(model), Graphs.replay
    with counted_decodes(model) as forwards, pytest.MonkeyPatch.context() as patched:

        def failing(self: Graphs, key: Any, step: Any) -> Any:
            gpu.failure = BROKEN[0] if isinstance(key, tuple) and key not in self._plain else None
            return replay(self, key, step)

        patched.setattr(Graphs, "replay", failing)
        assert run(engine, sampled) == want
    assert_only_graphs(gpu, forwards)
    assert engine._runner.no_graph == str(BROKEN[0]).splitlines()[0]
