"""Weights in int8, int4 and nf4: their bytes, their numbers, and what stays as it is."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import modeling_utils

from trimkv_cli.errors import ModelError
from trimkv_cli.loading import loader, quantise
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.model.spec import Dtype, ModelSpec, Quantisation
from trimkv_cli.plan.run import weight_bytes
from trimkv_cli.request import Request, SamplingParams

BUFFER_BYTES = 2 * 8 * 4 * 2 + 4  # rotary frequencies, kept twice, of up to two sets; a scale of the embeddings


@pytest.fixture
def folder(tiny_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves a tiny model of a family."""

    def save(family: str, **changes: Any) -> Path:
        tiny_model(family, **changes).save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


def options(path: Path, quantize: str, dtype: str = "fp32", **more: Any) -> EngineOptions:
    return EngineOptions(model=str(path), gates="streaming", quantize=quantize, dtype=dtype, max_inflight=1, **more)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral", "phi3", "gemma3"])
@pytest.mark.parametrize("quantize", ["none", "int8", "int4", "nf4"])
def test_the_weights_take_what_was_planned(family: str, quantize: Quantisation, folder: Callable[..., Path]) -> None:
    """Catches quantisation state that the plan forgot, a matrix left out, and weights that are held twice."""
    path = folder(family)
    dtypes: tuple[Dtype, ...] = ("fp32", "bf16")
    for dtype in dtypes:
        engine = load_engine(options(path, quantize, dtype))
        planned = engine.facts.plan.run.part_bytes("weights")
        assert planned <= engine.facts.weight_bytes <= planned + BUFFER_BYTES


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_no_more_is_allocated_ahead_than_the_weights_take(
    quantize: Quantisation, tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the unquantised size, allocated at once on a GPU whose budget holds only the quantised one."""
    asked: list[float] = []

    def record(model: Any, device_map: dict[str, Any], quantizer: Any) -> None:
        asked.extend(modeling_utils.get_total_byte_count(model, device_map, quantizer).values())

    monkeypatch.setattr(modeling_utils, "caching_allocator_warmup", record)
    monkeypatch.setattr(
        loader, "_quantisation_config", lambda form, *rest: quantise.quantisation_config(form, *rest[:2])
    )
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    load_engine(options(tmp_path, quantize, "bf16"))
    assert asked == [weight_bytes(ModelSpec.from_config(model.config.to_dict()), "bf16", quantize)]


class OnGpu:
    """A matrix that says it is on a GPU, and so does all that is made of it but what is asked to the CPU."""

    def __init__(self, data: Any = None, device: str = "cuda:0", **_: Any) -> None:
        self.made_from = data
        self.device = torch.device(device)

    def to(self, device: Any) -> OnGpu:
        return OnGpu(self, device)


def test_int8_on_a_gpu_is_made_while_weights_are_read() -> None:
    """Catches weights that stay whole until the first forward: bitsandbytes makes int8 of what leaves a CPU."""
    module = SimpleNamespace(weight=OnGpu())
    made = quantise._quantised(module, OnGpu())
    assert made.device == torch.device("cuda:0")
    given = made.made_from.made_from
    assert given.device == torch.device("cpu")


@pytest.mark.parametrize("quantize", ["int8", "int4", "nf4"])
def test_a_quantised_layer_computes_nearly_what_the_whole_one_does(quantize: str, folder: Callable[..., Path]) -> None:
    """Catches scales in the wrong place, and shapes that the layout for CPUs has no room for."""
    path = folder("qwen3", intermediate_size=80, head_dim=24)
    whole: Any = load_engine(options(path, "none"))._runner._model
    small: Any = load_engine(options(path, quantize))._runner._model
    compared = 0
    for name, layer in whole.get_decoder().layers.named_modules():
        if isinstance(layer, torch.nn.Linear):
            given = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
            got, want = small.get_decoder().layers.get_submodule(name)(given), layer(given)
            assert torch.nn.functional.cosine_similarity(got, want, dim=-1).min() > 0.98, name
            compared += 1
    assert compared == 7 * 3


def test_gates_keep_the_compute_dtype(golden: Path) -> None:
    """Catches gates in the dtype of the stored weights, and a fingerprint that does not know of quantisation."""
    engines = {
        quantize: load_engine(
            EngineOptions(model=str(golden / "qwen3_base"), gates=str(golden / "qwen3_rg"), quantize=quantize)
        )
        for quantize in ("none", "nf4")
    }
    for engine in engines.values():
        params = SamplingParams(max_tokens=4, temperature=0.0)
        assert len(list(engine.generate([Request(id="a", prompt_token_ids=tuple(range(3, 60)), params=params)]))) == 4
    sizes = {quantize: engine.facts.gate_bytes for quantize, engine in engines.items()}
    assert sizes["none"] == sizes["nf4"] == engines["nf4"].facts.plan.run.part_bytes("gates")
    assert engines["none"].fingerprint["quantize"] != engines["nf4"].fingerprint["quantize"]


def test_without_bitsandbytes_the_error_says_what_to_install(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a traceback, or a model that is silently loaded whole."""
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "bitsandbytes":
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModelError, match="bitsandbytes") as caught:
        load_engine(options(folder("qwen3"), "nf4"))
    assert "pip install bitsandbytes" in str(caught.value.hint)
