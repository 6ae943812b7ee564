"""Catches a plan built on numbers that are not the model's: parameters, windows, slots, bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_models import LATER_FAMILIES
from trimkv_cli.errors import BrokenModel, GateMismatch, ModelNotFound, UnsupportedModel, UsageError
from trimkv_cli.model.families import FAMILIES
from trimkv_cli.model.folders import read_config, read_gate_spec, read_model_spec, read_safetensors_headers
from trimkv_cli.model.spec import (
    TRAINED_VARIANTS,
    GateSpec,
    ModelSpec,
    gate_bytes,
    parse_dtype,
)

TINY = {
    "model_type": "qwen3",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}

VARIATIONS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 24}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {}),
    ("phi3", {}),
    ("gemma3", {}),
    ("gemma3", {"attention_bias": True, "tie_word_embeddings": False}),
    *((family, {}) for family in LATER_FAMILIES),
    *((family, {"attention_bias": True}) for family in LATER_FAMILIES),
]


@pytest.mark.parametrize(("family", "changes"), VARIATIONS)
def test_the_parameters_are_those_that_transformers_allocates(
    family: str, changes: dict[str, Any], tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model(family, **changes)
    spec = ModelSpec.from_config(model.config.to_dict())
    assert spec.weight_numel == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral", "phi3", "gemma3"])
def test_a_saved_folder_gives_the_same_spec(family: str, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    spec = read_model_spec(tmp_path)
    assert spec == ModelSpec.from_config(model.config.to_dict())
    assert spec.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if "hidden_size" in family.defaults])
def test_an_absent_key_means_what_transformers_assumes(model_type: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type).to_dict()
    short = ModelSpec.from_config({"model_type": model_type})
    assert short == ModelSpec.from_config(config)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, (None,) * 4),
        ({"sliding_window": 8}, (None,) * 4),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 8)),
        (
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
            },
            (8, None, None, 8),
        ),
        ({"model_type": "mistral", "sliding_window": 8}, (8,) * 4),
        ({"model_type": "mistral"}, (4096,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
        ({"model_type": "phi3", "sliding_window": 8}, (8,) * 4),
        ({"model_type": "llama", "sliding_window": 8}, (None,) * 4),
        ({"model_type": "gemma3_text", "sliding_window": 8, "sliding_window_pattern": 3}, (8, 8, None, 8)),
        ({"model_type": "gemma3_text", "sliding_window": 8, "num_hidden_layers": 6}, (8, 8, 8, 8, 8, None)),
    ],
)
def test_windows(changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert ModelSpec.from_config({**TINY, **changes}).windows == windows


def test_a_windowed_layer_has_no_more_slots_than_its_window() -> None:
    config = {**TINY, "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3, "head_dim": 16}
    spec = ModelSpec.from_config(config)
    assert [spec.slots(layer, 20) for layer in range(4)] == [20, 20, 20, 8]
    assert spec.kv_bytes_per_row(20, 2) == 2 * (20 + 20 + 20 + 8) * (2 * 16 * 2 + 8)


@pytest.mark.parametrize("rope", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("where", ["top", "inside"])
def test_long_rope_says_where_the_short_factors_end(rope: str, where: str) -> None:
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    config = {**TINY, "model_type": "phi3", rope: scaling}
    (config if where == "top" else scaling)["original_max_position_embeddings"] = 4096
    assert ModelSpec.from_config(config).original_max_positions == 4096


def test_other_rope_has_no_switch() -> None:
    nested = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "default"}}
    config = {**TINY, "model_type": "gemma3_text", "rope_parameters": nested}
    assert ModelSpec.from_config(config).original_max_positions is None


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtypes_of_old_and_new_configs(key: str) -> None:
    assert ModelSpec.from_config({**TINY, key: "bfloat16"}).dtype == "bf16"


def test_head_dim_falls_back_to_the_share_of_the_hidden_size() -> None:
    assert ModelSpec.from_config({**TINY, "model_type": "llama", "head_dim": None}).head_dim == 16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({}, "None"),
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, "multimodal"),
        ({"model_type": "idefics3", "text_config": {"model_type": "llama"}}, "multimodal"),
        ({"model_type": "gemma3", "text_config": TINY, "quantization_config": {"quant_method": "awq"}}, "multimodal"),
        ({**TINY, "model_type": "gemma3_text", "use_bidirectional_attention": True}, "bidirectional"),
    ],
)
def test_models_that_trimkv_does_not_run_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        ModelSpec.from_config(config)


@pytest.mark.parametrize("value", [0, -1, "64", 1.5, True])
def test_a_size_that_is_no_number_is_named(value: object) -> None:
    with pytest.raises(BrokenModel, match="hidden_size"):
        ModelSpec.from_config({**TINY, "hidden_size": value})


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        read_config(tmp_path)
    with pytest.raises(ModelNotFound, match="not a folder"):
        read_config(tmp_path / "missing")


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_config_that_is_no_json_object_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(BrokenModel, match=r"config\.json"):
        read_config(tmp_path)


def test_a_cut_off_safetensors_file_is_named(golden: Path, tmp_path: Path) -> None:
    whole = (golden / "qwen3_base" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:100])
    with pytest.raises(BrokenModel, match="cut off"):
        read_safetensors_headers(tmp_path)


def test_a_safetensors_file_that_lacks_the_end_of_its_tensors_is_named(golden: Path, tmp_path: Path) -> None:
    whole = (golden / "qwen3_base" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(BrokenModel, match="cut off"):
        read_safetensors_headers(tmp_path)


@pytest.mark.parametrize("header", [b"", b"[]", b'{"a": {}}', b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": 1}}'])
def test_a_senseless_safetensors_header_is_named(header: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 100)
    with pytest.raises(BrokenModel, match=r"model\.safetensors") as caught:
        read_safetensors_headers(tmp_path)
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": "longrope"},
        {"layer_types": ["full_attention"]},
        {"layer_types": "full_attention"},
        {"sliding_window": "8", "use_sliding_window": True},
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": None},
    ],
)
def test_odd_values_of_a_config_are_errors_and_not_tracebacks(changes: dict[str, Any]) -> None:
    with pytest.raises(BrokenModel, match=next(iter(changes)) if len(changes) == 1 else "window") as caught:
        ModelSpec.from_config({**TINY, **changes})
    assert caught.value.hint is not None


def test_headers_give_names_dtypes_and_shapes(golden: Path) -> None:
    headers = read_safetensors_headers(golden / "qwen3_base")
    assert headers["model.embed_tokens.weight"] == ("F32", (128, 64))


def test_released_gate_configs_are_read_with_their_float_memory_size(golden: Path) -> None:
    gate = read_gate_spec(golden / "qwen3_rg", id="golden")
    assert (gate.variant, gate.memory_size, gate.buffer_size, gate.hidden) == ("rg", 32, 8, 32)
    assert isinstance(gate.memory_size, int)


def test_our_own_gate_configs_are_read(tmp_path: Path) -> None:
    config = {
        "retention_gate": "rg10",
        "memory_size": 64,
        "trained_context": 8192,
        "retention_gate_intermediate_size": 32,
    }
    (tmp_path / "gates.json").write_text(json.dumps(config))
    assert read_gate_spec(tmp_path, id="own") == GateSpec(
        variant="rg10", id="own", hidden=32, memory_size=64, trained_context=8192
    )


@pytest.mark.parametrize(
    "config", [{}, {"retention_gate": "rg4"}, {"retention_gate": "rg", "memory_size": 1.5}, {"retention_gate": ["rg"]}]
)
def test_gates_that_trimkv_does_not_run_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(GateMismatch, match="some gates"):
        GateSpec.from_config(config, id="some gates")


def test_gate_parameters_are_those_of_the_modules(golden: Path) -> None:
    import torch

    from trimkv_cli.cache.gates import build_gates, layer_shapes, tensor_key

    spec = ModelSpec.from_config(read_config(golden / "qwen3_base"))
    for variant in TRAINED_VARIANTS.values():
        gate = GateSpec(variant=variant, id="test", hidden=48)
        width = 2 * 2 * 32 if variant in ("rg2", "rg3") else 64
        shapes = layer_shapes(variant=variant, input_size=width, hidden=48, num_kv_heads=2)
        tensors = {
            tensor_key(layer, name): torch.zeros(shape)
            for layer in range(spec.num_layers)
            for name, shape in shapes.items()
        }
        gates = build_gates(gate, spec, tensors, dtype=torch.bfloat16, device="cpu")
        parameters = [t for module in gates for t in (*module.parameters(), *module.buffers())]
        assert gate.numel(spec) == sum(t.numel() for t in parameters)
        assert gate_bytes(spec, gate, "bf16") >= sum(t.nbytes for t in parameters)


def test_dtype_flags() -> None:
    assert parse_dtype("auto", "bf16") == "bf16"
    assert parse_dtype("float16", "bf16") == "fp16"
    with pytest.raises(UsageError, match="fp8"):
        parse_dtype("fp8", "bf16")
