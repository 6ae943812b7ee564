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
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATER_FAMILIES: dict[str, dict[str, Any]] = {
    "ministral": {"sliding_window": 11},
    "ministral3": {},
    "smollm3": {"no_rope_layers": [1, 1, 0], "use_sliding_window": False},
    "olmo2": {},
    "olmo3": {"sliding_window": 11, "num_hidden_layers": 4},
    "granite": {},
    "glm": {},
    "glm4": {},
    "cohere2": {"sliding_window": 11, "num_hidden_layers": 4},
    "seed_oss": {},
    "exaone4": {"sliding_window": 11, "num_hidden_layers": 4},
    "apertus": {},
    "qwen3_moe": _EXPERTS,
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "use_qk_norm": True,
    },
    "gpt_oss": {"sliding_window": 11, "num_local_experts": 4, "num_experts_per_tok": 2},
}
_LINEAR: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **_LINEAR,
        **_EXPERTS,
        "shared_expert_intermediate_size": 24,
        "num_hidden_layers": 5,
        "layer_types": ["full_attention", *["linear_attention"] * 3, "full_attention"],
        "mlp_only_layers": [1],
    },
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": {**_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 24},
}
LATER_FAMILIES |= HYBRIDS


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
    known = FAMILIES.get(family) or {"model_type": family, **LATER_FAMILIES[family]}
    values = {**shape, **known, **changes}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.15)  # far from uniform, so that argmax is not noise
        elif name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    model.generation_config.eos_token_id = None
    return model
