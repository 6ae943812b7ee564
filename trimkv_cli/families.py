"""How the supported families differ: the defaults of their configs, their windows, their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def layer_windows(model_type: str, config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Give each layer's attention window (the query counted), None where it is full."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    if model_type in ("qwen2", "qwen3"):
        window = window if config.get("use_sliding_window") else None
        sliding = [layer >= config["max_window_layers"] for layer in range(layers)]
    elif model_type == "gemma3_text":
        sliding = [(layer + 1) % config["sliding_window_pattern"] != 0 for layer in range(layers)]
    else:
        return (window,) * int(layers)
    if config.get("layer_types"):
        sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    return tuple(window if slides else None for slides in sliding)


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
