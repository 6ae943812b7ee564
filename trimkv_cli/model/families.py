"""Differences between the supported families: defaults of their configs, windows, parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimkv_cli.errors import BrokenModel, UnsupportedModel

# What transformers' config classes assume for an absent key.
_QWEN: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {**_QWEN, "head_dim": 128},
    "qwen2": _QWEN,
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    },
    "phi3": {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
}
SUPPORTED_MODEL_TYPES = tuple(DEFAULTS)
SEQUENTIAL_FAMILIES = frozenset({"llama", "mistral", "phi3", "qwen2", "qwen3"})  # norm, attention, norm, MLP: no more


def supported_type(config: Mapping[str, Any]) -> str:
    """Return the config's model type.

    Raises:
        UnsupportedModel: a family or form that trimkv does not run.
    """
    model_type = str(config.get("model_type"))
    if "text_config" in config:
        hint = "take a text-only checkpoint; for Gemma 3 one with model_type gemma3_text, such as gemma-3-1b"
        raise UnsupportedModel(f"{model_type} is a multimodal model; trimkv runs text models", hint=hint)
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModel(
            f"model type {model_type} is not supported", hint=f"supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    if config.get("quantization_config"):
        raise UnsupportedModel("a quantized checkpoint is not supported", hint="take the model's original weights")
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModel("an embedding model (bidirectional attention) writes no text", hint="take its base")
    return model_type


def original_max_positions(config: Mapping[str, Any]) -> int | None:
    """Find where long-RoPE switches its factors; transformers 5 says `rope_parameters`, 4 `rope_scaling`."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise _senseless("rope_scaling", rope, "an object")
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in ("longrope", "su"):
        return None
    key = "original_max_position_embeddings"
    return positive({key: config.get(key) or rope.get(key)}, key, positive(config, "max_position_embeddings"))


def positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Read a whole number above 0; null means the default.

    Raises:
        BrokenModel: something else.
    """
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _senseless(key, value, "a whole number above 0")
    return value


def _senseless(key: str, value: object, wanted: str) -> BrokenModel:
    return BrokenModel(f"config.json: {key} = {value!r} is not {wanted}", hint="get the folder again")


def layer_windows(model_type: str, config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Give each layer's attention window (the query counted), None where it is full."""
    layers = positive(config, "num_hidden_layers")
    window = None if config.get("sliding_window") is None else positive(config, "sliding_window")
    if model_type in ("qwen2", "qwen3"):
        window, first = window if config.get("use_sliding_window") else None, config["max_window_layers"]
        if window is not None and not isinstance(first, int):
            raise _senseless("max_window_layers", first, "a whole number")
        sliding = [window is not None and layer >= first for layer in range(layers)]
    elif model_type == "gemma3_text":
        sliding = [(layer + 1) % positive(config, "sliding_window_pattern") != 0 for layer in range(layers)]
    else:
        return (window if model_type in ("mistral", "phi3") else None,) * layers
    kinds = config.get("layer_types")
    if kinds and (not isinstance(kinds, list) or len(kinds) != layers):
        raise _senseless("layer_types", kinds, f"a list of {layers} names")
    if kinds:
        sliding = [kind == "sliding_attention" for kind in kinds]
    return tuple(window if slides else None for slides in sliding)


def layer_matrices(model_type: str, *, hidden: int, intermediate: int, q: int, kv: int) -> tuple[tuple[int, int], ...]:
    """List the linear layers (outputs, inputs) of one decoder layer as transformers makes them."""
    if model_type == "phi3":
        return (q + 2 * kv, hidden), (hidden, q), (2 * intermediate, hidden), (hidden, intermediate)
    attention = (q, hidden), (kv, hidden), (kv, hidden), (hidden, q)
    return *attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)


def weight_numel(
    model_type: str,
    config: Mapping[str, Any],
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate_size: int,
    vocab_size: int,
) -> int:
    """Count the parameters that transformers allocates; tied embeddings count once."""
    q, kv = num_heads * head_dim, num_kv_heads * head_dim
    attention = hidden_size * (q + 2 * kv) + q * hidden_size
    if model_type == "qwen2":
        attention += q + 2 * kv
    elif config.get("attention_bias") and model_type in ("qwen3", "llama", "gemma3_text"):
        attention += q + 2 * kv + hidden_size
    mlp = 3 * hidden_size * intermediate_size
    if model_type == "llama" and config.get("mlp_bias"):
        mlp += 2 * intermediate_size + hidden_size
    norms = {"qwen3": 2 * hidden_size + 2 * head_dim, "gemma3_text": 4 * hidden_size + 2 * head_dim}
    layer = attention + mlp + norms.get(model_type, 2 * hidden_size)
    embeddings = vocab_size * hidden_size * (1 if config["tie_word_embeddings"] else 2)
    return num_layers * layer + hidden_size + embeddings
