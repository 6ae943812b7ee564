"""The sampler against transformers' processors, and the promise that a token depends on its request alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trimkv_cli.engine.filters import draw, fraction_of, locate, random_fraction, weigh
from trimkv_cli.engine.sampler import Sampler
from trimkv_cli.request import SamplingParams

VOCAB = 1037  # two blocks and a rest, odd

sampling_params = st.builds(
    SamplingParams,
    temperature=st.one_of(st.just(1.0), st.floats(0.2, 3.0)),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.999)),
    top_k=st.one_of(st.just(0), st.integers(1, 60), st.just(5000)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.9)),
    top_h=st.one_of(st.none(), st.floats(0.05, 0.99)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2.0)),
    seed=st.integers(0, 2**63 - 1),
)


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def drawn(sampler: Sampler, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Return the probabilities `[B, V]` that a sampler draws from."""
    with mock.patch("trimkv_cli.engine.sampler.draw", wraps=draw) as drawing:
        sampler(logits, rows)
    weights = torch.cat([call.args[0] for call in drawing.call_args_list]).double()
    return (weights / weights.sum(-1, keepdim=True)).float()


def expected(logits: torch.Tensor, params: SamplingParams, seen: list[int]) -> torch.Tensor:
    """Run transformers' processors on one row [V], in the order of GenerationMixin._get_logits_processor."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_h is not None:
        processors.append(TopHLogitsWarper(params.top_h))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    processors.append(MinPLogitsWarper(params.min_p))
    return processors(torch.tensor([seen]), logits[None].clone())[0].softmax(-1)


@settings(max_examples=60, deadline=None)
@given(st.lists(sampling_params, min_size=1, max_size=5), st.integers(0, 10**6))
def test_a_mixed_batch_filters_each_row_as_transformers_does_alone(batch: list[SamplingParams], seed: int) -> None:
    """Catches a wrong stage order, an off-by-one at a cut, and a stage that leaks into rows that did not ask for it."""
    logits = random_logits(len(batch), seed)
    sampler = Sampler(len(batch) + 2, VOCAB, "cpu")
    rows = list(range(len(batch), 0, -1))
    seen = [[(7 * row + i * i) % VOCAB for i in range(9)] for row in rows]
    for row, params, ids in zip(rows, batch, seen, strict=True):
        sampler.set_row(row, params, ids)
    got = drawn(sampler, logits, rows)
    for row, params in enumerate(batch):
        want = expected(logits[row], params, seen[row])
        # A token whose running sum lies within rounding of a cut may fall on either side of it: never more than one.
        differs = (want > 1e-7) != (got[row] > 1e-7)
        assert differs.sum() <= 1
        if not differs.any():
            assert torch.allclose(got[row], want, atol=1e-5)


def test_generated_tokens_count_for_the_penalty() -> None:
    """Catches a penalty that knows the prompt only."""
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0)
    sampler = Sampler(1, 8, "cpu")
    sampler.set_row(0, params, [0])
    logits = torch.tensor([[9.0, 8.0, 7.0, 6.0, -1.0, -1.0, -1.0, -1.0]])
    assert [int(sampler(logits, [0])) for _ in range(4)] == [1, 2, 3, 0]


def test_greedy_takes_the_lowest_id_of_a_tie_and_reads_half_precision() -> None:
    sampler = Sampler(2, 6, "cpu")
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0, 5.0, 0.0]] * 2, dtype=torch.bfloat16)
    assert sampler(logits, [0, 1]).tolist() == [1, 1]


def test_the_same_request_gives_the_same_tokens_in_any_row_of_any_batch() -> None:
    """Catches randomness or rounding that depends on the row, the batch or the neighbours' stages."""
    params = SamplingParams(temperature=1.3, repetition_penalty=1.2, seed=2**63 - 1)
    others = [
        SamplingParams(top_p=0.6, seed=row, temperature=0.0 if row % 3 == 0 else 0.7, top_k=row, min_p=0.01 * row)
        for row in range(8)
    ]
    alone, crowded = Sampler(1, VOCAB, "cpu"), Sampler(8, VOCAB, "cpu")
    alone.set_row(0, params, [3, 4])
    for row, other in enumerate(others):
        crowded.set_row(row, params if row == 5 else other, [3, 4])
    for step in range(200):
        logits = random_logits(8, step)
        assert alone(logits[5:6], [0]).item() == crowded(logits, range(8))[5].item()


def test_a_seed_repeats_and_every_bit_of_it_matters() -> None:
    def tokens(seed: int) -> list[int]:
        sampler = Sampler(1, VOCAB, "cpu")
        sampler.set_row(0, SamplingParams(seed=seed), [])
        return [int(sampler(logits, [0])) for _ in range(6)]

    logits = torch.zeros(1, VOCAB)
    assert tokens(5) == tokens(5)
    runs = [tokens(seed) for seed in [0, *(2**bit for bit in range(63)), 2**63 - 1]]
    assert len({tuple(run) for run in runs}) == len(runs)


@pytest.mark.parametrize("axis", ["steps", "seeds"])
def test_the_uniform_is_uniform_along_steps_and_along_seeds(axis: str) -> None:
    """Chi-square over 64 bins of the high and of the low bits; 63 degrees of freedom, 5 sigma is about 120."""
    count = torch.arange(64_000)
    fixed = torch.full_like(count, 12345)
    fraction = random_fraction(fixed, count) if axis == "steps" else random_fraction(count, fixed)
    assert fraction.min() >= 0
    assert fraction.max() < 2**32
    for bins in (fraction >> 26, fraction & 63):
        observed = torch.bincount(bins, minlength=64).float()
        assert ((observed - 1000) ** 2 / 1000).sum() < 120


def test_the_hash_is_splitmix64() -> None:
    """The bits are part of what a seed means: they may not change between versions, devices or torch builds."""

    def mix(bits: int) -> int:
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
        return bits ^ (bits >> 31)

    pairs = [(0, 0), (1, 0), (0, 1), (2**63 - 1, 77), (2**40 + 3, 10**6)]
    want = [mix((mix(seed) + (step + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 32 for seed, step in pairs]
    seeds, steps = torch.tensor([pair[0] for pair in pairs]), torch.tensor([pair[1] for pair in pairs])
    assert random_fraction(seeds, steps).tolist() == want


def test_tokens_come_as_often_as_their_probability_says() -> None:
    """Catches an inverse CDF that is off by one or drops the rest of a block."""
    logits = torch.log(torch.tensor([[0.5, 0.0, 0.25, 0.125, 0.125]])).expand(20_000, -1)
    steps = torch.arange(20_000)
    tokens = draw(weigh(logits, torch.zeros(1)), random_fraction(torch.zeros_like(steps), steps))
    share = torch.bincount(tokens, minlength=5) / 20_000
    assert share[1] == 0
    assert torch.allclose(share, logits[0].exp(), atol=0.015)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3000), st.data())
@settings(max_examples=30, deadline=None)
def test_locate_is_the_inverse_of_the_running_sum(weights: list[int], data: st.DataObject) -> None:
    total = sum(weights)
    target = data.draw(st.integers(-1, total))
    running = torch.tensor(weights).cumsum(0)
    got = locate(torch.tensor([weights]), torch.tensor([target])).item()
    want = int((running <= target).sum())
    assert got == want or (target >= total and got >= want)


@given(st.integers(0, 2**58 - 1), st.integers(0, 2**32))
def test_fraction_of_is_exact(total: int, fraction: int) -> None:
    assert fraction_of(torch.tensor(total), torch.tensor(fraction)).item() == total * fraction >> 32


def test_a_row_state_is_undone_and_moved() -> None:
    """Catches a snapshot that shares memory with the live row, and a move that forgets step or counts."""
    params = SamplingParams(repetition_penalty=1.5, seed=9)
    sampler = Sampler(3, VOCAB, "cpu")
    sampler.set_row(0, params, [1, 2])
    batches = [random_logits(1, step) for step in range(12)]
    first = [int(sampler(logits, [0])) for logits in batches[:4]]
    state = sampler.row_state(0)
    second = [int(sampler(logits, [0])) for logits in batches[4:]]
    sampler.restore_row(1, state)
    sampler.move_row(1, 2)
    assert [int(sampler(logits, [2])) for logits in batches[4:]] == second
    sampler.set_row(0, params, [1, 2])
    assert [int(sampler(logits, [0])) for logits in batches[:4]] == first


def test_where_all_logits_but_one_are_masked_that_one_is_chosen() -> None:
    """Catches an id out of range, which would be an illegal address in the embedding."""
    sampler = Sampler(2, VOCAB, "cpu")
    sampler.set_row(0, SamplingParams(top_p=0.5, top_h=0.5, top_k=3, min_p=0.1), [])
    sampler.set_row(1, SamplingParams(), [])
    masked = torch.full((2, VOCAB), -torch.inf).index_fill(1, torch.tensor(4), 0.0)
    assert sampler(masked, [0, 1]).tolist() == [4, 4]


def test_counts_are_allocated_only_for_a_penalty_and_one_sort_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory and work that no row asked for."""
    sorts = []
    sort = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda *args, **kwargs: sorts.append(1) or sort(*args, **kwargs))
    sampler = Sampler(2, VOCAB, "cpu")
    sampler.set_row(0, SamplingParams(min_p=0.1), [1])
    sampler.set_row(1, SamplingParams(temperature=0.0, top_k=5, top_p=0.5), [1])
    sampler(random_logits(2), [0, 1])
    penalties = sampler._penalties
    assert penalties._seen is penalties._made is penalties._bias is None
    assert not sorts
    sampler.set_row(1, SamplingParams(top_k=5, top_p=0.5, top_h=0.5), [1])
    sampler(random_logits(2), [0, 1])
    assert len(sorts) == 1


@settings(max_examples=30, deadline=None)
@given(st.lists(sampling_params, min_size=1, max_size=6), st.integers(0, 10**6), st.booleans())
def test_what_a_graph_chooses_is_what_a_call_chooses(batch: list[SamplingParams], seed: int, coarse: bool) -> None:
    """Catches a stage that a form leaves out, a tie cut elsewhere, and a random number that an idle row uses up."""
    called, captured = (Sampler(len(batch) + 1, VOCAB, "cpu") for _ in range(2))
    batch = [replace(params, repetition_penalty=1.0) for params in batch]
    for sampler in (called, captured):
        for row, params in enumerate(batch):
            sampler.set_row(row, params, [])
    form = captured.form(range(len(batch)))
    assert form is not None
    live = torch.arange(len(batch) + 1) < len(batch)
    for step in range(3):
        logits = random_logits(len(batch) + 1, seed + step)
        logits = logits.round() if coarse else logits.bfloat16()
        idle = captured.choose(logits, form, live=live & (torch.arange(len(live)) > 0))
        assert idle.shape == (len(live),)
        captured.replay(0, [5] * step)
        captured._step[1 : len(batch)] -= 1
        want = called(logits[:-1], range(len(batch)))
        assert torch.equal(captured.choose(logits, form, live=live)[:-1], want)


def test_a_choice_takes_few_operations_and_reads_nothing_on_the_host() -> None:
    """Catches a read of the device, which no graph can hold, and a stage that is done twice."""
    logits, live = random_logits(1), torch.ones(1, dtype=torch.bool)
    forms = {10: {"temperature": 0.0}, 70: {"min_p": 0.1}, 105: {"top_k": 20, "top_p": 0.8}}
    for most, how in forms.items():
        sampler = Sampler(1, VOCAB, "cpu")
        sampler.set_row(0, SamplingParams(**how), [])  # type: ignore[arg-type]
        kind = sampler.form([0])
        assert kind is not None
        with Operations() as done:
            sampler.choose(logits, kind, live=live)
        assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2"} & set(done.names)
        assert len(done.names) <= most


class Operations(TorchDispatchMode):
    """List the operations that would each be a kernel or more on a GPU: those that return no view."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten.empty_like.default:
            self.names.append(func._schema.name)
        return made
