"""The engine against transformers, against a replay of the whole history, and against itself in other company."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from helpers.engines import LONG_ROPE, Shape, greedy, make_engine, run
from helpers.tiny_models import LATER_FAMILIES
from trimkv_cli.cache.attention import GenerationView, install
from trimkv_cli.cache.gates import FullGate
from trimkv_cli.cache.releases import cache_argument
from trimkv_cli.cache.retention_cache import RetentionCache
from trimkv_cli.errors import ContextOverflow, UsageError
from trimkv_cli.model.spec import ModelSpec
from trimkv_cli.plan import choices
from trimkv_cli.request import Request, SamplingParams

FAMILIES = ["qwen3", "qwen2", "llama", "mistral", "phi3", "gemma3"]
EVERY_FAMILY = [*FAMILIES, *LATER_FAMILIES]
TinyModel = Callable[..., Any]


def make_prompts(count: int, longest: int = 60, seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(3, 128) for _ in range(rng.randrange(1, longest))) for _ in range(count)]


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_full_budget_gives_the_tokens_of_transformers(family: str, tiny_model: TinyModel) -> None:
    """Catches every fault in masks, positions, windows, chunking, padding and refilled rows."""
    prompts, new = make_prompts(7), 16
    model = tiny_model(family)
    want = [
        model.generate(torch.tensor([p]), max_new_tokens=new, do_sample=False, pad_token_id=0)[0, len(p) :].tolist()
        for p in prompts
    ]
    model = tiny_model(family)
    for chunk in (512, 7, 1, 0) if family in FAMILIES else (512, 7, 0):
        for rows in (1, 3) if family in FAMILIES else (3,):
            engine = make_engine(model, Shape(prefill_chunk=chunk, rows=rows))
            got = run(engine, [greedy(str(i), p, new) for i, p in enumerate(prompts)])
            assert [got[str(i)] for i in range(len(prompts))] == want, (chunk, rows)
            model = tiny_model(family)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_generate_over_the_cache_with_left_padding(family: str, tiny_model: TinyModel) -> None:
    """Catches a dropped padding mask when other tools call `generate` with our cache."""
    ids = torch.randint(3, 128, (3, 21), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, :13] = 0
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    model = tiny_model(family)
    want = model.generate(ids, **arguments)
    spec = ModelSpec.from_config(model.config.to_dict())
    install(model, [FullGate(num_kv_heads=2)] * spec.num_kv_layers, undo=ExitStack())
    cache = RetentionCache(
        rows=3,
        kv_budget=64,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        windows=spec.windows,
        dtype=torch.float32,
        device=torch.device("cpu"),
        state=spec.state,
    )
    assert torch.equal(model.generate(ids, **{cache_argument(model): GenerationView(cache)}, **arguments), want)


def brute_force_kept(log_beta: torch.Tensor, ends: list[int], budget: int, window: int | None) -> list[int]:
    """Replay evictions of one head from its log_beta `[seen]`, cut at `ends`: pure Python, over the full history."""
    kept: list[int] = []
    start = 0
    for end in ends:
        kept += range(start, end)
        scores = {p: (torch.tensor(end + 1.0 - p) * log_beta[p]).item() for p in kept}
        if window is not None:
            scores = {p: s if p > end - 1 - window else float("-inf") for p, s in scores.items()}
        kept = sorted(kept, key=lambda p: (-scores[p], p))[: budget if window is None else min(budget, window)]
        start = end
    return sorted(kept)


@pytest.mark.parametrize(
    ("family", "chunk", "budget"),
    [
        *product(["qwen3", "gemma3"], [0, 1, 3, 16], [1, 2, 5, 13]),
        *((family, 3, 5) for family in EVERY_FAMILY),
    ],
)
def test_kept_sets_equal_a_replay_of_the_scores(family: str, chunk: int, budget: int, tiny_model: TinyModel) -> None:
    """Catches boundaries that are not multiples of the chunk, a system boundary forgotten, and any wrong loser."""
    engine = make_engine(tiny_model(family), Shape(kv_budget=budget, prefill_chunk=chunk, gate="random", rows=2))
    prompt, new, prefix = make_prompts(1, seed=3)[0] * 2, 11, 4
    engine.start_trace()
    run(engine, [greedy("a", prompt, new, keep=True, prefix_len=prefix)])
    seen = engine.kept.seen("a")
    assert seen == len(prompt) + new - 1
    step = chunk or len(prompt)
    prefill_ends = {*range(step, len(prompt), step), len(prompt)} | ({prefix} if chunk else set())
    ends = [*sorted(prefill_ends), *range(len(prompt) + 1, seen + 1)]
    log_beta = engine.traced_log_beta()
    windows = ModelSpec.from_config(tiny_model(family).config.to_dict()).windows
    for layer, heads in enumerate(engine.kept.positions("a")):
        history = torch.tensor(log_beta[layer])
        assert history.shape[1] == seen
        for head, kept in enumerate(heads):
            assert kept == brute_force_kept(history[head], ends, budget, windows[layer])


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "olmo3"])
def test_deterministic_requests_do_not_depend_on_their_company(family: str, tiny_model: TinyModel) -> None:
    """Catches any number that depends on batch size, row, order or a shared prefix, with eviction going on."""
    system = (5, 9, 33, 7)
    requests = [
        Request(
            id=str(i),
            prompt_token_ids=system + prompt if i % 2 else prompt,
            prefix_len=len(system) if i % 2 else 0,
            params=SamplingParams(max_tokens=24, temperature=0.0 if i % 3 else 0.9, top_p=0.9, seed=i),
        )
        for i, prompt in enumerate(make_prompts(7, seed=5))
    ]
    shape = Shape(kv_budget=11, rows=8, prefill_chunk=16, gate="random", deterministic=True)
    engine = make_engine(tiny_model(family), shape)
    alone: dict[str, list[int]] = {}
    for request in requests:
        alone |= run(engine, [request])
    assert run(engine, requests) == alone
    assert run(engine, requests[::-1]) == alone
    few = make_engine(tiny_model(family), replace(shape, rows=1))
    assert run(few, requests[3:]) == {r.id: alone[r.id] for r in requests[3:]}
    assert engine.stats.shared_prefix_tokens > 0


def test_a_shared_prefix_is_prefilled_once(tiny_model: TinyModel) -> None:
    """Catches a prefix computed again for each request, and a copy that changes tokens."""
    system = make_prompts(1, longest=2, seed=9)[0] * 40
    requests = [greedy(str(i), system + p, 5, prefix_len=len(system)) for i, p in enumerate(make_prompts(9, seed=2))]
    shape = Shape(kv_budget=24, rows=4, prefill_chunk=16, gate="random")
    shared = make_engine(tiny_model("qwen3"), shape)
    together = run(shared, requests)
    assert shared.stats.shared_prefix_tokens == len(system) * (len(requests) - 1)
    assert shared.stats.prefill_tokens == len(system) + sum(len(r.prompt_token_ids) - len(system) for r in requests)
    apart = make_engine(tiny_model("qwen3"), replace(shape, rows=1))
    assert run(apart, requests) == together
    assert apart.stats.shared_prefix_tokens == 0


def test_a_continued_request_feeds_only_what_is_new(tiny_model: TinyModel) -> None:
    """Catches a second turn that reads the first again, or forgets the last answer's final token."""
    first, second = make_prompts(2, seed=4)
    shape = Shape(kv_budget=200, rows=1)
    talk = make_engine(tiny_model("llama"), shape)
    answer = run(talk, [greedy("1", first, 6, keep=True)])["1"]
    fed_before = talk.stats.prefill_tokens
    reply = run(talk, [greedy("2", (answer[-1], *second), 6, keep=True, continues="1")])["2"]
    assert talk.stats.prefill_tokens - fed_before == 1 + len(second)
    whole = make_engine(tiny_model("llama"), shape)
    assert run(whole, [greedy("x", (*first, *answer, *second), 6)])["x"] == reply


def test_stopping_in_the_prompt_loses_nothing(tiny_model: TinyModel) -> None:
    """Catches the unread rest of a stopped prompt being dropped when the conversation goes on."""
    first, second = make_prompts(1, seed=6)[0] * 3, (7, 8, 9)
    engine = make_engine(tiny_model("llama"), Shape(kv_budget=300, rows=1, prefill_chunk=8))
    engine.add(greedy("1", first, 5, keep=True))
    assert engine.step() == []
    event = engine.stop("1")
    assert event is not None
    assert event.finish_reason == "abort"
    reply = run(engine, [greedy("2", second, 5, continues="1")])["2"]
    whole = make_engine(tiny_model("llama"), Shape(kv_budget=300, rows=1))
    assert run(whole, [greedy("x", first + second, 5)])["x"] == reply


def test_eos_ends_a_request_and_its_row_is_refilled(tiny_model: TinyModel) -> None:
    """Catches rows that go on after EOS, or stay empty while requests wait."""
    prompts = make_prompts(6, seed=8)
    free = run(make_engine(tiny_model("qwen3"), Shape(rows=2)), [greedy(str(i), p, 12) for i, p in enumerate(prompts)])
    eos = free["0"][4]
    engine = make_engine(tiny_model("qwen3"), Shape(rows=2, eos=frozenset({eos})))
    ended = run(engine, [greedy(str(i), p, 12) for i, p in enumerate(prompts)])
    for key, tokens in free.items():
        cut = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        assert ended[key] == tokens[:cut]


def test_what_cannot_be_honoured_is_refused(tiny_model: TinyModel) -> None:
    """Catches clamping: an overlong, empty or foreign prompt must be an error with a reason."""
    engine = make_engine(tiny_model("qwen3"), Shape(kv_budget=512, rows=1))
    engine.check(greedy("fits", [5] * 500, 13))
    with pytest.raises(ContextOverflow, match="512") as caught:
        engine.check(greedy("long", [5] * 500, 14))
    assert caught.value.param == "max_tokens"
    with pytest.raises(ContextOverflow, match="513 prompt tokens") as caught:
        engine.check(greedy("longer", [5] * 513, 1))
    assert caught.value.param is None
    with pytest.raises(UsageError, match="empty"):
        engine.check(greedy("empty", [], 4))
    with pytest.raises(UsageError, match="128"):
        engine.check(greedy("foreign", [5, 128], 4))
    with pytest.raises(ContextOverflow, match="evict nothing"):
        make_engine(tiny_model("qwen3"), Shape(kv_budget=64, rows=1)).check(greedy("full", [5] * 60, 6))


def test_chunks_that_are_read_together_change_no_token(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a plan for several chunks that the engine reads one by one, and chunks that are cut elsewhere."""
    requests = [greedy(str(i), range(3 + i, 43 + 7 * i), 5) for i in range(4)]
    shape = Shape(kv_budget=24, rows=4, prefill_chunk=16, gate="random")
    alone, together = make_engine(tiny_model("qwen3"), shape), []
    want = run(alone, requests)
    monkeypatch.setattr(choices, "PREFILL_TOKENS", {"cpu": 64})
    engine = make_engine(tiny_model("qwen3"), shape)
    read = engine._runner._prefill
    engine._runner._prefill = lambda batch: (together.append(len(batch.chunks)), read(batch))[1]  # type: ignore[method-assign]
    assert run(engine, requests) == want
    assert max(together) == 4
    assert engine.stats.steps < alone.stats.steps


def test_long_rope_sets_are_chosen_per_sequence(tiny_model: TinyModel) -> None:
    """Catches a factor set picked by the batch: short and long sequences side by side keep their own."""
    short, long = (3, 5, 8, 13, 21), tuple(range(3, 103))
    model = tiny_model("phi3", **LONG_ROPE)
    want = {
        key: model.generate(torch.tensor([p]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(p) :].tolist()
        for key, p in (("short", short), ("long", long))
    }
    engine = make_engine(tiny_model("phi3", **LONG_ROPE), Shape(kv_budget=256, rows=2))
    assert run(engine, [greedy("short", short, 12), greedy("long", long, 12)]) == want
