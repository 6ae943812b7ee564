"""Matrices of 4 and 8 bits: their levels against gguf-py's, their products, and models that are made of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor, nn

from helpers.gguf_files import write_gguf
from trimkv_cli.engine.cpu import PackedEmbedding, PackedLinear, Scratch, pack, packed, settle
from trimkv_cli.engine.cpu.packed import (
    GROUP,
    lay_together,
    multiply_int8,
    pack_int4,
    pack_vocabulary,
    quantise_int4,
    quantise_int8,
    unpack_int4,
)
from trimkv_cli.loading.gguf import GgufWeight
from trimkv_cli.loading.loader import load_engine, load_model
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import find_source
from trimkv_cli.model.gguf import GgufTensor, TensorType
from trimkv_cli.request import Request, SamplingParams

CPU = torch.device("cpu")
BF16 = 2**-8  # of a number, that rounding moves it by
EXACT = ("Q4_0", "Q4_1", "Q4_K")
NEVER = 1 << 40


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks(kind: str, rows: int, columns: int) -> np.ndarray[Any, Any]:
    """Return random blocks of a type, their one or two halves between 0.001 and 0.1."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    made = np.random.default_rng(0).integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    halves = np.random.default_rng(1).uniform(0.001, 0.1, (rows, columns // block, 1 if kind == "Q4_0" else 2))
    made[..., : 2 * halves.shape[-1]] = halves.astype(np.float16).view(np.uint8)
    return made.reshape(rows, -1)


def stored(path: Path, kind: str, rows: int, columns: int, heads: int | None = None) -> tuple[GgufWeight, Tensor]:
    """Write a matrix of random blocks; return it as it is read, and its numbers by gguf-py."""
    raw = blocks(kind, rows, columns)
    path.write_bytes(raw.tobytes())
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    tensor = GgufTensor(path=path, offset=0, type=TensorType(kind, block, size), shape=(rows, columns))
    full = torch.from_numpy(np.array(dequantize(raw, GGMLQuantizationType[kind])))
    return GgufWeight(tensor, torch.float32, heads=heads), full


@pytest.mark.parametrize("kind", EXACT)
def test_levels_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    """Catches halves of a block in each other's place, six-bit scales put together wrongly, and a minimum's sign."""
    weight, full = stored(tmp_path / "blocks", kind, 64, 512)
    (levels,) = weight.levels()
    codes, scale, zero = levels
    made = (codes.float().view(64, -1, GROUP) - 8) * scale[..., None] + zero[..., None]
    torch.testing.assert_close(made.flatten(1), full, rtol=1e-6, atol=1e-6)
    kept = unpack_int4(*pack_int4([levels]), torch.empty(512, 64)).t()
    bound = BF16 * (8 * scale.abs() + zero.abs())
    assert ((kept - full).abs().view(64, -1, GROUP) <= bound[..., None]).all()


def test_rows_of_query_and_key_are_in_the_order_of_transformers(tmp_path: Path) -> None:
    """Catches packed heads that stay in llama.cpp's order, which whole ones do not."""
    weight, full = stored(tmp_path / "blocks", "Q4_1", 128, 64, heads=2)
    by_hand = [head * 64 + 2 * row + half for head in range(2) for half in range(2) for row in range(32)]
    kept = unpack_int4(*pack_int4(weight.levels()), torch.empty(64, 128)).t()
    torch.testing.assert_close(kept, full[by_hand], rtol=0, atol=4 * BF16)
    assert torch.equal(weight[...], full[by_hand])


def test_rows_that_are_packed_some_at_a_time_are_those_packed_at_once() -> None:
    """Catches parts that lie in the order of their own number of rows."""
    full = random(192, 96)
    for form in ("int4", "int8"):
        parts, whole = pack(full.split(64), form), pack([full], form)  # type: ignore[arg-type]
        assert all(torch.equal(*each) for each in zip(parts, whole, strict=True))


def test_four_bits_are_unpacked_in_the_order_of_this_processor() -> None:
    """Catches an order of another processor, and codes that are taken for signed ones."""
    codes, scale, zero = quantise_int4(random(128, 64))
    by_hand = [
        [(int(codes[n, k]) - 8) * float(scale[n, k // 32]) + float(zero[n, k // 32]) for n in range(128)]
        for k in range(64)
    ]
    made = unpack_int4(*pack_int4([(codes, scale, zero)]), torch.empty(64, 128))
    torch.testing.assert_close(made, torch.tensor(by_hand))


def test_where_the_order_is_not_known_nothing_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches noise for weights on a processor that packs as none that is known."""
    monkeypatch.setattr(packed, "_packed_together", lambda: None)
    assert Scratch(torch.float32, 2).from_tokens > 1 << 60


def test_a_group_keeps_within_a_step_of_its_weights() -> None:
    """Catches a search that prefers a range which cuts too much, and groups of one value that become infinite."""
    full = random(64, 64)
    full[3], full[4, :32] = 0.5, 0.0
    codes, scale, zero = (each.float() for each in quantise_int4(full))
    made = (codes.view(64, -1, GROUP) - 8) * scale[..., None] + zero[..., None]
    groups = full.view(64, -1, GROUP)
    plain = (groups.amax(dim=-1) - groups.amin(dim=-1)) / 15
    error = (made - groups).square().mean(dim=-1)
    assert (error <= (plain / 2 + BF16 * 3).square()).all()
    assert torch.equal(made[3], groups[3])
    assert torch.equal(made[4, 0], groups[4, 0])


def test_eight_bits_are_within_half_a_step_and_their_products_exact() -> None:
    """Catches scales of another row, a row of zeros that becomes NaN, and activations of 8 bits alone."""
    full, x = random(48, 96), random(300, 96, seed=1) * torch.tensor([[1e-3], [1.0], [50.0], [0.0]]).repeat(75, 1)
    full[7] = 0.0
    codes, scale = quantise_int8(full)
    kept = codes.float() * scale[:, None]
    assert ((kept - full).abs() <= scale[:, None] * 0.5001).all()
    assert torch.equal(scale, full.abs().amax(dim=1) / 127)
    exact = x.double() @ kept.double().t()
    finest = x.abs().amax(dim=1, keepdim=True) / (127 * 254)
    bound = finest.double() * kept.abs().sum(dim=1).double() * 0.51 + 1e-6
    assert ((multiply_int8(x, codes, scale).double() - exact).abs() <= bound).all()


def test_columns_of_a_vocabulary_have_factors_of_their_own() -> None:
    """Catches a few large columns that take all levels from the others, factors forgotten, and a column of zeros."""
    full = random(256, 64)
    full[:, 5] *= 100
    full[:, 6] = 0
    codes, scales, columns = pack_vocabulary(full.split(64), 256)
    small = [column for column in range(64) if column != 5]

    def lost(kept: Tensor) -> float:
        return float((kept - full)[:, small].norm() / full[:, small].norm())

    plain, scale = quantise_int8(full)
    assert lost(codes * scales[:, None] * columns) < 0.2 * lost(plain * scale[:, None])
    assert torch.equal((codes * scales[:, None] * columns)[:, 6], full[:, 6])


def linear(form: Any, outputs: int, inputs: int, scratch: Scratch, *, seed: int = 0) -> tuple[PackedLinear, Tensor]:
    """Return a packed layer of random weights, and the weights that it has."""
    plain = nn.Linear(inputs, outputs, bias=False)
    made = PackedLinear(plain, form, scratch)
    weight, scales = pack([random(outputs, inputs, seed=seed)], form)
    made.weight = nn.Parameter(weight, requires_grad=False)
    settle(made, scales, None)
    kept = weight * scales[:, None] if form == "int8" else unpack_int4(weight, scales, torch.empty(inputs, outputs)).t()
    return made, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_of_many_tokens_give_one_product(dtype: torch.dtype) -> None:
    """Catches chunks of a prompt that differ where their lengths lie on both sides of a limit."""
    scratch = Scratch(dtype, 4)
    layer, kept = linear("int4", 128, 96, scratch)
    x = random(4, 96, seed=1)
    exact, size = x @ kept.t(), x.norm(dim=1, keepdim=True) * kept.norm(dim=1)
    assert ((layer(x[:3]) - exact[:3]).abs() <= 2 * BF16 * size[:3]).all()
    rest = 1e-6 if dtype == torch.float32 else 2 * BF16
    assert ((layer(x) - exact).abs() <= rest * size).all()
    assert scratch._buffer.numel() == 128 * 96
    wide, _ = linear("int4", 64, 64, scratch)
    wide(random(4, 64))
    assert scratch._buffer.numel() == 128 * 96


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_layers_that_lie_together_are_given_back(form: str) -> None:
    """Catches rows of one layer that end up in another's, and a model that stays changed when its engine is done."""
    layers = [linear(form, outputs, 64, Scratch(torch.float32, NEVER), seed=outputs)[0] for outputs in (128, 64, 64)]
    before = [(each.weight.clone(), each.scales.clone()) for each in layers]
    x, undo = random(3, 64), ExitStack()
    want = torch.cat([each(x) for each in layers], dim=-1)
    weight, scales = lay_together(layers, undo)
    multiply = packed.multiply_int4 if form == "int4" else multiply_int8
    assert torch.equal(multiply(x, weight, scales).float(), want)
    assert torch.equal(torch.cat([each(x) for each in layers], dim=-1), want)
    assert all(each.scales.untyped_storage().data_ptr() == scales.untyped_storage().data_ptr() for each in layers)
    undo.close()
    for each, (weight_before, scales_before) in zip(layers, before, strict=True):
        assert torch.equal(each.weight, weight_before)
        assert torch.equal(each.scales, scales_before)
        assert each.weight.untyped_storage().nbytes() == weight_before.nbytes


def load(path: Path, quantize: Any, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(find_source(EngineOptions(model=str(path)), weights=True), dtype, CPU, quantize=quantize)


def test_a_tied_head_and_the_embedding_are_one(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Catches a vocabulary that is held twice, and one of two that is taken for tied."""
    write_gguf(tmp_path / "tiny.gguf", "llama", kind="Q8_0", tie_word_embeddings=True)
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "apart")
    for path, quantize, tied in ((tmp_path / "tiny.gguf", "stored", True), (tmp_path / "apart", "int4", False)):
        model = load(path, quantize)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert (type(embedding), type(head)) == (PackedEmbedding, PackedLinear)
        for name in ("weight", "scales", "columns"):
            assert (getattr(embedding, name).data_ptr() == getattr(head, name).data_ptr()) is tied


def test_gemmas_embedding_is_scaled(tmp_path: Path) -> None:
    """Catches rows without the factor that Gemma's own embedding multiplies by."""
    model = write_gguf(tmp_path / "tiny.gguf", "gemma3", kind="Q8_0")
    ids = torch.arange(3, 40)
    want, got = (each.get_input_embeddings()(ids) for each in (model, load(tmp_path / "tiny.gguf", "stored")))
    assert (got - want).norm() <= 0.01 * want.norm()


def test_a_matrix_that_no_group_divides_stays_plain(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Catches a product that fails in the middle of loading, and a matrix that the plan takes for packed."""
    tiny_model("qwen3", intermediate_size=80, head_dim=32).save_pretrained(tmp_path)
    asked = EngineOptions(model=str(tmp_path), gates="streaming", quantize="int4", dtype="fp32", max_inflight=1)
    engine = load_engine(asked)
    layer: Any = engine._runner._model.get_decoder().layers[0]
    kinds = [type(module) for module in (*layer.self_attn.children(), *layer.mlp.children())]
    assert (kinds.count(PackedLinear), kinds.count(nn.Linear)) == (4, 3)
    run = engine.facts.plan.run
    assert run.packing.unpacked == 9
    assert abs(engine.facts.weight_bytes - run.part_bytes("weights")) < 200
    assert any("9 matrices stay in fp32" in choice for choice in engine.facts.plan.choices)


@pytest.mark.parametrize(("family", "quantize"), [("llama", "stored"), ("qwen3", "int8"), ("phi3", "int4")])
def test_steps_of_the_decoder_are_those_of_transformers(family: str, quantize: str, tmp_path: Path) -> None:
    """Catches a fast path whose packed products lie together, and those of a prompt, that differ from plain modules."""
    write_gguf(tmp_path / "tiny.gguf", family, kind="Q4_1")
    prompt = list(range(70, 190, 3))
    options = EngineOptions(
        model=str(tmp_path / "tiny.gguf"), gates="none", kv_budget="200", dtype="fp32", quantize=quantize,
        max_inflight=1, prefill_chunk=16, threads=1, device="cpu",
    )  # fmt: skip
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=1)
    with closing(load_engine(options)) as engine:
        assert engine._runner._decoder is not None
        events = list(engine.generate([Request(id="a", prompt_token_ids=tuple(prompt), params=params)]))
    made = [
        (token, logprob) for event in events for token, logprob in zip(event.token_ids, event.logprobs, strict=True)
    ]
    ids = torch.tensor([prompt + [token for token, _ in made]])
    expected = load(tmp_path / "tiny.gguf", quantize)(input_ids=ids).logits[0].log_softmax(-1)
    for index, (token, logprob) in enumerate(made):
        at = expected[len(prompt) + index - 1]
        assert at[token] >= at.max() - 0.05
        assert abs(float(at[token]) - logprob.logprob) < 0.05
