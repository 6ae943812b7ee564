"""Tiny random models of every family."""

from __future__ import annotations

from typing import Any

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3"},
    "qwen2": {"model_type": "qwen2"},
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": 11},
    "phi3": {"model_type": "phi3"},
    "gemma3": {"model_type": "gemma3_text", "sliding_window": 11, "num_hidden_layers": 7, "query_pre_attn_scalar": 16},
}


def make_model(family: str, **changes: Any) -> Any:
    """Build a tiny float32 model of a family; the same arguments give the same weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    values = {**shape, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.15)  # far from uniform, so that argmax is not noise
    model.generation_config.eos_token_id = None
    return model
