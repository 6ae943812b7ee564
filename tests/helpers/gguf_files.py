"""GGUF files of tiny models, as llama.cpp's converter lays them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize

from helpers import tiny_tokenizers
from helpers.tiny_models import make_model

ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "gemma3": "gemma3"
}  # fmt: skip


def write_gguf(path: Path, family: str, *, kind: str = "F32", template: str | None = None, **changes: Any) -> Any:
    """Write a tiny model of a family with matrices of a type; return the model whose weights were stored."""
    tokenizer = tiny_tokenizers.byte_level(*tiny_tokenizers.special("<|end|>"), template=template)
    model = make_model(family, vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, **changes)
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family])
    _write_values(writer, model.config)
    _write_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family]),
        model.config.num_hidden_layers,
    )
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        owner, _, ending = name.rpartition(".")
        stored = f"{names.get_name(owner)}.{ending}"
        weight.copy_(torch.from_numpy(_rounded(weight.numpy(), kind)))
        _write_tensor(writer, stored, _as_stored(stored, weight.numpy(), family, model.config), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _write_values(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if hasattr(config, "head_dim") else 16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope.get("full_attention", rope)["rope_theta"]))
    if writer.arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    words = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([word for word, _ in words])
    special = set(tokenizer.all_special_tokens) | {t.content for t in tokenizer.added_tokens_decoder.values()}
    writer.add_token_types([3 if word in special else 1 for word, _ in words])
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids("<|end|>"))
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _as_stored(name: str, weight: np.ndarray, family: str, config: Any) -> np.ndarray:
    """Lay a weight out as llama.cpp does: rows of q and k in pairs for `llama`, Gemma's norms with 1 added."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    part = name.split(".")[-2]
    if family == "llama" and part in heads:
        count = heads[part]
        halves = weight.reshape(count, 2, weight.shape[0] // count // 2, *weight.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
    return weight + 1 if family == "gemma3" and name.endswith("norm.weight") else weight


def _rounded(weight: np.ndarray, kind: str) -> np.ndarray:
    """Return what is left of a weight when it was stored; blocks lie within rows, whose order changes nothing."""
    return dequantize(quantize(weight, _type_of(weight, kind)), _type_of(weight, kind))


def _type_of(weight: np.ndarray, kind: str) -> gguf.GGMLQuantizationType:
    stored = gguf.GGMLQuantizationType[kind]
    whole = weight.ndim > 1 and weight.shape[-1] % gguf.GGML_QUANT_SIZES[stored][0] == 0
    return stored if whole else gguf.GGMLQuantizationType.F32


def _write_tensor(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: str) -> None:
    stored = _type_of(weight, kind)
    if stored == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, weight.astype(np.float32))
    else:
        writer.add_tensor(name, quantize(weight, stored), raw_dtype=stored)
