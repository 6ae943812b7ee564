"""Checkpoints that are stored quantised: transformers' tokens, the bytes of the plan, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, TorchAoConfig

from helpers.quantised_models import COMPRESSED, FP8, MXFP4, save_quantised, set_config, unpacked_model
from trimkv_cli.engine.engine import Engine
from trimkv_cli.errors import BrokenModel, ModelError, UnsupportedModel, UsageError
from trimkv_cli.loading import sources
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.model import quantised
from trimkv_cli.model.folders import read_model_spec
from trimkv_cli.model.spec import ModelSpec
from trimkv_cli.request import Request, SamplingParams

PROMPTS = [[70, 81, 92, 103, 114, 125, 6, 17, 28, 39], [5, 4, 3]]
NEW = 12
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},  # above 0 no batch answers as its rows do alone
    "nf4": NF4,
    "nf4-nested": {**NF4, "bnb_4bit_use_double_quant": True},
}


def load(path: Path, **options: Any) -> Engine:
    return load_engine(EngineOptions(model=str(path), gates="none", kv_budget="96", threads=1, device="cpu", **options))


def answers(engine: Engine, prompts: Sequence[list[int]] = PROMPTS) -> list[list[int]]:
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    requests = [Request(id=str(n), prompt_token_ids=tuple(p), params=params) for n, p in enumerate(prompts)]
    made: dict[str, list[int]] = {}
    for event in engine.generate(requests):
        made.setdefault(event.request_id, []).extend(event.token_ids)
    return [made[str(n)] for n in range(len(prompts))]


def generated(path: Path, **options: Any) -> list[list[int]]:
    return generate(AutoModelForCausalLM.from_pretrained(str(path), **options).eval())


def generate(model: Any) -> list[list[int]]:
    model.generation_config.eos_token_id = None
    made = [model.generate(torch.tensor([p]), max_new_tokens=NEW, do_sample=False, pad_token_id=0) for p in PROMPTS]
    return [ids[0, len(prompt) :].tolist() for ids, prompt in zip(made, PROMPTS, strict=True)]


@pytest.fixture(params=BITSANDBYTES)
def by_bitsandbytes(request: Any, tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    """Save a model that bitsandbytes quantised."""
    pytest.importorskip("bitsandbytes")
    tiny_model("qwen3", hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(**BITSANDBYTES[request.param])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(tmp_path / "quantised")
    return tmp_path / "quantised"


def test_bitsandbytes(by_bitsandbytes: Path) -> None:
    """Catches scales that were lost, a second quantisation, and bytes that the plan does not know."""
    engine = load(by_bitsandbytes)
    assert answers(engine) == generated(by_bitsandbytes)
    planned = engine.facts.plan.run.part_bytes("weights")
    assert abs(planned - engine.facts.weight_bytes) < 0.02 * planned
    assert engine.facts.plan.run.precision.startswith("bitsandbytes")


def test_int8_answers_alone_as_in_a_batch(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Catches columns in 16 bits that the other sequences of a batch choose."""
    pytest.importorskip("bitsandbytes")
    model = tiny_model("qwen3")
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            torch.nn.init.uniform_(parameter, 1.0, 5.0)  # activations past the threshold of 6
    model.save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(tmp_path / "quantised")
    engine = load(tmp_path / "quantised")
    assert answers(engine) == [answers(engine, [prompt])[0] for prompt in PROMPTS]


def test_the_config_alone_says_nearly_the_bytes(by_bitsandbytes: Path) -> None:
    """Catches a repository whose plan, made before its weights are here, counts them as unquantised."""
    config = json.loads((by_bitsandbytes / "config.json").read_text())
    stored, exact = ModelSpec.from_config(config).weight_bytes, read_model_spec(by_bitsandbytes).weight_bytes
    assert abs(stored - exact) < 0.1 * exact


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_fp8_is_unpacked(dtype: str, tmp_path: Path) -> None:
    """Catches block scales that are left out, and a plan of what is stored instead of what is held."""
    path = save_quantised(tmp_path, FP8)
    engine = load(path, dtype=dtype)
    if dtype == "auto":
        own = generated(path, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True))
        assert answers(engine) == own == generate(unpacked_model(path))
    planned = engine.facts.plan.run.part_bytes("weights")
    assert abs(planned - engine.facts.weight_bytes) < 0.02 * planned
    assert any("unpacked" in choice for choice in engine.facts.plan.choices)


def test_compressed_tensors_are_unpacked(tmp_path: Path) -> None:
    """Catches matrices that are unpacked at the first step, beside what was planned, and activations in 8 bits."""
    pytest.importorskip("compressed_tensors")
    path = save_quantised(tmp_path, COMPRESSED)
    engine = load(path)
    assert answers(engine) == generate(unpacked_model(path))
    planned = engine.facts.plan.run.part_bytes("weights")
    assert abs(planned - engine.facts.weight_bytes) < 0.02 * planned


def test_mxfp4_is_unpacked(tmp_path: Path) -> None:
    """Catches experts with the two halves of a byte exchanged, and a plan of the 4 bits that only GPUs compute with."""
    path = save_quantised(tmp_path, MXFP4, "gpt_oss")
    assert answers(load(path)) == generate(unpacked_model(path, "gpt_oss"))
    engine = load(path, dtype="bf16")  # older releases know no other
    planned = engine.facts.plan.run.part_bytes("weights")
    assert abs(planned - engine.facts.weight_bytes) < 0.02 * planned


def test_torchao(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Catches weights that the fast path of a CPU takes for plain ones, and bytes of what they stand for."""
    torchao = pytest.importorskip("torchao.quantization")
    tiny_model("qwen3").save_pretrained(tmp_path / "plain")
    settings = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(tmp_path / "quantised")
    engine = load(tmp_path / "quantised")
    assert answers(engine) == generated(tmp_path / "quantised")
    planned = engine.facts.plan.run.part_bytes("weights")
    assert abs(planned - engine.facts.weight_bytes) < 0.02 * planned


def test_a_package_is_missed_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches gigabytes that are downloaded for a model that cannot run."""
    path, asked = save_quantised(tmp_path, AWQ), []

    def folder(ref: sources.ModelRef, kind: str, *, offline: bool) -> Path:
        asked.append(kind)
        return path

    monkeypatch.setattr(sources.ModelRef, "folder", folder)
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="not installed here"):
        sources.find_source(EngineOptions(model="someone/tiny-awq"), weights=True)
    assert asked == ["config"]


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        (AWQ, "gptqmodel"),
        (GPTQ, "optimum gptqmodel"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
        (COMPRESSED, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes accelerate"),
        (FP8, "accelerate"),
        ({"quant_method": "mxfp4"}, "accelerate"),
    ],
)
def test_a_missing_package_is_named_before_weights_are_read(
    settings: dict[str, Any], missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches transformers' own error, which comes late and in many lines."""
    path = save_quantised(tmp_path, settings)
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    monkeypatch.setattr(quantised, "find_spec", lambda name: None if name.replace("_", "-") in missing else name)
    with pytest.raises(ModelError, match="not installed here") as caught:
        load(path)
    assert f"pip install {missing}" in str(caught.value.hint)


@pytest.mark.parametrize("settings", [AWQ, GPTQ])
def test_what_needs_a_gpu_says_so(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a checkpoint for GPUs that is read on a CPU."""
    path = save_quantised(tmp_path, settings)
    monkeypatch.setattr(quantised, "find_spec", lambda name: name)
    with pytest.raises(UnsupportedModel, match="needs a GPU"):
        load(path)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"quant_method": "hqq"}, UnsupportedModel, "quant_method = 'hqq'.*transformers 5"),
        ({"quant_method": "dust"}, UnsupportedModel, r"config\.json.*quant_method = 'dust'"),
        ({}, UnsupportedModel, "quant_method = None"),
        ("awq", BrokenModel, "not an object"),
    ],
)
def test_a_method_that_nothing_knows_is_named(
    settings: Any, error: type[ModelError], said: str, tiny_model: Callable[..., Any]
) -> None:
    """Catches weights that are read as if nothing had quantised them."""
    config = tiny_model("qwen3").config.to_dict()
    with pytest.raises(error, match=said):
        ModelSpec.from_config({**config, "quantization_config": settings})


@pytest.mark.parametrize(("flag", "value"), [("quantize", "int8"), ("quantize", "nf4"), ("dtype", "bf16")])
def test_what_is_packed_is_not_changed_again(flag: str, value: str, tmp_path: Path) -> None:
    """Catches a flag that is passed over in silence."""
    path = save_quantised(tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    set_config(path, dtype="float32")
    with pytest.raises(UsageError, match=f"--{flag} {value}.*bitsandbytes 8-bit"):
        load(path, **{flag: value})
