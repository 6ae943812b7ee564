"""A GGUF file's config as transformers would write it. Plain Python; of the weights only rotation factors are read."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

from trimkv_cli.errors import BrokenModel, UnsupportedModel
from trimkv_cli.model.gguf import GgufHeader

# model_type of each architecture whose tensors are those of transformers under other names.
MODEL_TYPES: Mapping[str, str] = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma3": "gemma3_text",
}
_KEYS: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "context_length": "max_position_embeddings",
}
_REQUIRED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count", "context_length")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """Write what a file says of its model as a config.json would.

    Raises:
        UnsupportedModel: an architecture or a rotation that trimkv does not run from GGUF.
        BrokenModel: a value that is missing, or that contradicts the tensors.
    """
    model_type = MODEL_TYPES.get(header.architecture)
    if model_type is None:
        raise UnsupportedModel(
            f"{header.path}: architecture {header.architecture} is not one that trimkv runs from GGUF",
            hint=f"known: {', '.join(MODEL_TYPES)}; or the hub id of the original safetensors repository",
        )
    missing = [key for key in _REQUIRED if header.get(key) is None]
    if missing:
        raise _wrong(header, f"{header.architecture}.{missing[0]} is missing")
    config = {name: header.get(key) for key, name in _KEYS.items() if header.get(key) is not None}
    config["model_type"] = model_type
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    config["vocab_size"] = _shape(header, "token_embd.weight")[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["dtype"] = _dtype(header)
    if model_type in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if model_type in ("llama", "qwen2", "qwen3"):
        config.pop("sliding_window", None)
    _check_shapes(header, config)
    return {**config, **_rotation(header, config), **_end_tokens(header), **_of_family(config)}


def sampling_of(header: GgufHeader) -> dict[str, Any]:
    """Return the sampling parameters that a file recommends."""
    names = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    said = {name: header.metadata.get(f"general.sampling.{key}") for key, name in names.items()}
    return {name: value for name, value in said.items() if value is not None}


def _of_family(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["model_type"] != "gemma3_text":
        return {}
    # Of all sizes only 27B, with 62 layers, scales queries by something else than the width of a head.
    large = config["num_hidden_layers"] == 62
    scalar = config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    return {"query_pre_attn_scalar": scalar, "rope_local_base_freq": 10000.0, "hidden_activation": "gelu_pytorch_tanh"}


def _end_tokens(header: GgufHeader) -> dict[str, Any]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    said = {name: header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in names.items()}
    ends = [said["eos_token_id"], *(header.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom"))]
    said["eos_token_id"] = list(dict.fromkeys(token_id for token_id in ends if token_id is not None)) or None
    return said  # none is None: transformers' own defaults are of another vocabulary


def _dtype(header: GgufHeader) -> str:
    """Name the dtype that the model computed in, as far as the file shows; blocks are of what was bfloat16."""
    kinds = {tensor.type.name for tensor in header.tensors.values()}
    if kinds == {"F32"}:
        return "float32"
    return "float16" if kinds <= {"F32", "F16"} else "bfloat16"


def _rotation(header: GgufHeader, config: Mapping[str, Any]) -> dict[str, Any]:
    """Say how positions are rotated: the base, and what stretches it."""
    said = {"rope_theta": float(header.get("rope.freq_base", 10000.0))}
    rotated = header.get("rope.dimension_count", config["head_dim"])
    if rotated != config["head_dim"]:
        said["partial_rotary_factor"] = rotated / config["head_dim"]
    if "rope_factors_long.weight" in header.tensors:
        return {**said, **_long_rope(header, config)}
    if "rope_freqs.weight" in header.tensors:
        return {**said, "rope_scaling": _llama3(header, said["rope_theta"], rotated)}
    kind = header.get("rope.scaling.type", "none")
    factor = header.get("rope.scaling.factor", 1.0)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return said
    if kind not in ("linear", "yarn"):
        raise UnsupportedModel(f"{header.path}: rotations scaled by {kind}", hint="take the safetensors repository")
    scaling = {"rope_type": kind, "factor": factor}
    original = header.get("rope.scaling.original_context_length")
    if kind == "yarn" and original is not None:
        scaling["original_max_position_embeddings"] = original
    return {**said, "rope_scaling": scaling}


def _long_rope(header: GgufHeader, config: Mapping[str, Any]) -> dict[str, Any]:
    original = header.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    factors = {f"{length}_factor": _floats(header, f"rope_factors_{length}.weight") for length in ("long", "short")}
    return {"original_max_position_embeddings": original, "rope_scaling": {"rope_type": "longrope", **factors}}


def _llama3(header: GgufHeader, theta: float, rotated: int) -> dict[str, Any]:
    """Find the scaling of Llama 3 whose factors per frequency the file holds."""
    stored = _floats(header, "rope_freqs.weight")
    scaling = {"rope_type": "llama3", "factor": float(round(max(stored))), **_LLAMA3}
    for index, factor in enumerate(stored):
        wave = 2 * math.pi * theta ** (2 * index / rotated)
        if not math.isclose(factor, _llama3_factor(wave, scaling), rel_tol=1e-3):
            raise UnsupportedModel(
                f"{header.path}: rope_freqs.weight are no factors of Llama 3", hint="take the safetensors repository"
            )
    return scaling


def _llama3_factor(wave: float, scaling: Mapping[str, Any]) -> float:
    """Return what a frequency of this wavelength is divided by (Llama 3.1)."""
    low, high, original = (scaling[key] for key in _LLAMA3)
    if wave < original / high:
        return 1.0
    if wave > original / low:
        return float(scaling["factor"])
    smooth = (original / wave - low) / (high - low)
    return float(1 / ((1 - smooth) / scaling["factor"] + smooth))


def _floats(header: GgufHeader, name: str) -> list[float]:
    """Read a small tensor of float32."""
    tensor = header.tensors[name]
    if tensor.type.name != "F32":
        raise _wrong(header, f"{name} is {tensor.type.name}, not F32")
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        return list(struct.unpack(f"<{tensor.nbytes // 4}f", file.read(tensor.nbytes)))


def _check_shapes(header: GgufHeader, config: Mapping[str, Any]) -> None:
    """Hold the sizes that the file names against its tensors."""
    hidden, heads, kv = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    q, kv_width = heads * config["head_dim"], kv * config["head_dim"]
    fused = config["model_type"] == "phi3"
    wanted = {"token_embd.weight": (config["vocab_size"], hidden), "blk.0.attn_output.weight": (hidden, q)}
    wanted |= (
        {"blk.0.attn_qkv.weight": (q + 2 * kv_width, hidden)}
        if fused
        else {"blk.0.attn_q.weight": (q, hidden), "blk.0.attn_k.weight": (kv_width, hidden)}
    )
    wanted["blk.0.ffn_down.weight"] = (hidden, config["intermediate_size"])
    for name, shape in wanted.items():
        if _shape(header, name) != shape:
            stored, implied = (" × ".join(map(str, sizes)) for sizes in (_shape(header, name), shape))
            raise _wrong(header, f"{name} is {stored}, and {header.architecture}.* imply {implied}")


def _shape(header: GgufHeader, name: str) -> tuple[int, ...]:
    if name not in header.tensors:
        raise _wrong(header, f"the tensor {name} is missing")
    return header.tensors[name].shape


def _wrong(header: GgufHeader, what: str) -> BrokenModel:
    return BrokenModel(f"{header.path}: {what}", hint="get the file again")
