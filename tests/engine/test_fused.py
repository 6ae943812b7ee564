"""Decode steps as a GPU runs them, beside transformers: by the reference, and by Triton in its interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.step_kernels import FORMS as REAL_FORMS
from bench.step_kernels import counted
from helpers.engines import Shape, as_on_a_gpu, greedy, make_engine, run
from trimkv_cli.cache.gates import MlpGate
from trimkv_cli.cache.retention_cache import RetentionCache
from trimkv_cli.engine.cuda import Decoder, make_decoder
from trimkv_cli.engine.engine import Engine
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.model.pins import Amount, Pins
from trimkv_cli.model.spec import ModelSpec
from trimkv_cli.request import Request, SamplingParams
from trimkv_kernels import StepOperations, step_reference

TinyModel = Callable[..., Any]
# Every form of layer that is known: norms of heads, biases, one matrix for three, windows, two rotations.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", {}),
    "qwen2": ("qwen2", {}),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_size": 40}),
    "mistral": ("mistral", {}),
    "phi3": ("phi3", {}),
    "gemma3": ("gemma3", {}),
}
PROMPTS = [tuple(3 + (7 * n + 13 * seed) % 120 for n in range(length)) for seed, length in enumerate((37, 5, 60))]
INTERPRETED = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1", reason="there is no interpreter here"
)


def fused(model: Any, shape: Shape, module: Any = step_reference, **more: Any) -> Engine:
    with as_on_a_gpu(module):
        return make_engine(model, shape, **more)


def asked(count: int = 12, **more: Any) -> list[Request]:
    return [greedy(str(n), prompt, count + n, keep=True, **more) for n, prompt in enumerate(PROMPTS)]


def generate(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(ids, max_new_tokens=count, do_sample=False, attention_mask=torch.ones_like(ids))
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens


def kept(engine: Engine) -> list[Any]:
    return [engine.kept.positions(str(n)) for n in range(len(PROMPTS))]


@pytest.mark.parametrize("form", FORMS)
def test_with_a_slot_for_each_token_the_tokens_are_those_of_transformers(form: str, tiny_model: TinyModel) -> None:
    """Catches a norm, bias, rotation or head that goes astray, and weights that are not given back."""
    family, changes = FORMS[form]
    model = tiny_model(family, **changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want = {str(n): generate(model, prompt, 12 + n) for n, prompt in enumerate(PROMPTS)}
    engine = fused(model, Shape(rows=3, prefill_chunk=16))
    assert run(engine, asked()) == want
    engine.close()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    owned = [parameter for parameter in model.parameters() if parameter.untyped_storage().nbytes() != parameter.nbytes]
    assert owned == []


CASES = {
    "random": ("qwen3", Shape(kv_budget=16, gate="random", rows=3, prefill_chunk=16), Pins()),
    "rg": ("gemma3", Shape(kv_budget=16, gate="rg", rows=3, prefill_chunk=16), Pins(sinks=8)),
    "rg2": ("llama", Shape(kv_budget=16, gate="rg2", rows=3, prefill_chunk=16), Pins(recent=3)),
    "prompt": ("qwen2", Shape(kv_budget=16, gate="random", rows=3, prefill_chunk=16), Pins(prompt=Amount(4))),
    "streaming": ("mistral", Shape(kv_budget=16, gate="streaming", rows=3, prefill_chunk=16), Pins()),
    "keydiff": ("gemma3", Shape(kv_budget=16, gate="keydiff", rows=3, prefill_chunk=16), Pins(sinks=2)),
}


@pytest.mark.parametrize("case", CASES)
def test_evictions_are_those_of_one_layer_after_the_other(case: str, tiny_model: TinyModel) -> None:
    """Catches a loser of another layer or window, gates that read what another reads, a pin that is left out."""
    family, shape, pins = CASES[case]
    results = []
    for make in (partial(make_engine, fast_path=False), fused):
        engine = make(tiny_model(family), shape, pins=pins)
        tokens, held = run(engine, asked(20)), kept(engine)
        engine.kept.release("0")
        engine.start_trace()
        run(engine, asked()[:1])
        results.append((tokens, held, [torch.tensor(layer) for layer in engine.traced_log_beta()]))
        engine.close()
    (want, want_kept, wanted), (got, got_kept, given) = results
    assert got == want
    assert got_kept == want_kept
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_what_other_tests_of_engines_do_works_fused(tiny_model: TinyModel) -> None:
    """Catches slots that are found where they lay before a resize, a step that cannot be taken back, a row ahead."""
    shape = Shape(kv_budget=16, gate="random", rows=2, prefill_chunk=16, eos=frozenset({7, 11, 40}))
    results = []
    for make in (partial(make_engine, fast_path=False), fused):
        engine = make(tiny_model("qwen3"), shape)
        if make is fused:
            engine._runner.run_ahead(shape.eos)
        said: list[Any] = []
        for n, more in enumerate(({"temperature": 0.0}, {"temperature": 1.5, "seed": 3}, {"temperature": 0.0})):
            params = SamplingParams(max_tokens=40, **more)
            engine.add(Request(id=str(n), prompt_token_ids=PROMPTS[n], params=params, keep=n == 0))
        sizes = iter((9, 21))
        tokens: dict[str, list[int]] = {}
        while engine.has_work:
            for event in engine.step():
                tokens.setdefault(event.request_id, []).extend(event.token_ids)
                if len(tokens["0"]) in (4, 8) and event.request_id == "0":
                    said.append(engine.resize(next(sizes)).evicted)
        results.append((tokens, said, engine.kept.positions("0")))
        engine.close()
    assert results[1] == results[0]


def test_positions_given_anew_are_those_that_are_rotated_to(tiny_model: TinyModel) -> None:
    """Catches a token that stands where the sequence is, and not where its row was renumbered to."""
    shape = Shape(kv_budget=16, gate="random", rows=2, prefill_chunk=16, rebases=True)
    requests = [greedy(str(n), prompt, 70) for n, prompt in enumerate(PROMPTS[:2])]
    results = []
    for make in (partial(make_engine, fast_path=False), fused):
        engine = make(tiny_model("qwen3", max_position_embeddings=48), shape)
        if make is fused:
            engine._runner.run_ahead(())
        results.append(run(engine, requests))
        engine.close()
    assert results[1] == results[0]


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3"])
def test_in_16_bits_it_rounds_no_worse_than_transformers(family: str, tiny_model: TinyModel) -> None:
    """Catches what is kept in another dtype than the model's, and a sum or a norm that is rounded too early."""
    plain, half = tiny_model(family), tiny_model(family).bfloat16()
    half.get_decoder().rotary_emb.float()  # as when it is loaded
    ids = torch.tensor([PROMPTS[2]])
    spec = ModelSpec.from_config(plain.config.to_dict())
    shape: dict[str, Any] = {"num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim, "windows": spec.windows}
    with as_on_a_gpu():
        cache = RetentionCache(rows=1, kv_budget=96, dtype=torch.bfloat16, device=torch.device("cpu"), **shape)
    gate = {"input_size": spec.hidden_size, "hidden": 8, "num_kv_heads": spec.num_kv_heads}
    gates = [MlpGate(variant="rg", activation=torch.nn.SiLU(), **gate) for _ in spec.windows]
    for each in gates:
        each.linear1.bfloat16()
        each.linear2.bfloat16()
    with ExitStack() as undo:
        want, own = plain(ids).logits[0], half(ids).logits[0].float()
        how: dict[str, Any] = {"sinks": 0, "evicts": True, "undo": undo}
        decoder = make_decoder(half, gates, cache, **how, operations=StepOperations.of(step_reference))
        assert decoder is not None
        logits = []
        with torch.inference_mode():
            for n, token in enumerate(PROMPTS[2]):
                position = torch.tensor([n], dtype=torch.int32)
                made, log_beta = decoder.step(torch.tensor([token]), position, dense=False)
                logits.append(made[0])
        assert (made.dtype, log_beta.dtype) == (torch.bfloat16, torch.float32)
    error = (torch.stack(logits).float() - want).norm()
    assert error <= 1.1 * (own - want).norm()


@INTERPRETED
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_the_kernels_of_triton_do_it_too(family: str, tiny_model: TinyModel) -> None:
    """Catches a kernel that is given another's tensors: each alone equals its reference."""
    from trimkv_kernels import step

    shape, requests = Shape(kv_budget=9, gate="rg", rows=2, prefill_chunk=16), asked(6)[:2]
    results = []
    for make in (partial(make_engine, fast_path=False), partial(fused, module=step)):
        engine = make(tiny_model(family, num_hidden_layers=2), shape)
        results.append((run(engine, requests), [engine.kept.positions(str(n)) for n in range(2)]))
        engine.close()
    assert results[1] == results[0]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton has no wheel for this platform")
@pytest.mark.parametrize("form", REAL_FORMS)
def test_a_layer_is_ten_kernels(form: str) -> None:
    """Catches a copy, a norm or a bias that becomes a kernel of its own: 36 layers have it 36 times a token.

    Also a step that reads what it computed: here there is nothing to read, as while a graph is captured.
    """
    found = counted(form, rows=8)
    assert found["per_layer"] == 10, found["layer"]
    assert len(found["before"]) + len(found["after"]) <= 24


@pytest.mark.parametrize("form", ["qwen2", "phi3"])
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_weights_that_a_library_quantised_stay_with_it(
    quantize: str, form: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Catches packed numbers that are multiplied as if they were weights, and a bias that is added twice."""
    tiny_model(form).save_pretrained(tmp_path)
    options = EngineOptions(model=str(tmp_path), gates="streaming", quantize=quantize, dtype="fp32", max_inflight=3)
    results = []
    for fast in (False, True):
        with as_on_a_gpu() if fast else nullcontext():
            engine = load_engine(options)
        assert isinstance(engine._runner._decoder, Decoder) == fast
        results.append(run(engine, asked(6)))
        engine.close()
    assert results[1] == results[0]


@pytest.mark.parametrize("what", ["family", "activation"])
def test_a_form_that_is_not_known_is_left_to_transformers(what: str, tiny_model: TinyModel) -> None:
    """Catches layers taken for others."""
    changes = {"hidden_act": "relu"} if what == "activation" else {}
    model = tiny_model("olmo2" if what == "family" else "qwen3", **changes)
    engine = make_engine(model, Shape(), fast_path=False)
    parts = model, [], engine._runner.cache
    with ExitStack() as undo:
        how: dict[str, Any] = {"sinks": 0, "evicts": True, "undo": undo}
        assert make_decoder(*parts, **how, operations=StepOperations.of(step_reference)) is None
        assert make_decoder(*parts, **how) is None  # a CPU has no operations of its own for it
