"""A GGUF file as transformers' config, tokenizer and weights; what each stored tensor becomes is decided here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from trimkv_cli.cache.releases import unknown_form
from trimkv_cli.errors import BrokenModel, ModelError, UnsupportedModel
from trimkv_cli.model.gguf import MERGES, TOKENS, GgufHeader, GgufTensor, read_gguf
from trimkv_cli.model.gguf_config import gguf_config, sampling_of

_UNPACKED_AT_ONCE = 1 << 22  # values: what is unpacked beside the tensor that they go into
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_FLAGS = ("add_bos_token", "add_eos_token")


@dataclass(frozen=True, slots=True)
class GgufWeight:
    """Stand for one stored tensor; `[...]` reads and unpacks it, in the order of rows that transformers has."""

    stored: GgufTensor
    dtype: torch.dtype
    heads: int | None = None  # whose rows are stored in pairs of the two halves that a rotation mixes
    offset: float = 0.0  # that was added when it was stored

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.stored.shape)

    def is_floating_point(self) -> bool:
        return True

    def __getitem__(self, _: EllipsisType) -> Tensor:
        rows, width = _as_matrix(self.stored.shape)
        made = torch.empty(rows, width, dtype=self.dtype)
        at_once = max(1, _UNPACKED_AT_ONCE // width)
        with self.stored.path.open("rb") as file:
            file.seek(self.stored.offset)
            for start in range(0, rows, at_once):
                part = made[start : start + at_once]
                part.copy_(self._unpack(file.read(len(part) * width // self.stored.type.block * self.stored.type.size)))
        if self.offset:
            made -= self.offset
        if self.heads is not None:
            made = made.view(self.heads, -1, 2, width).transpose(1, 2).reshape(rows, width)
        return made.view(self.shape)

    def _unpack(self, data: bytes) -> Tensor:
        """Return the values of whole rows `[rows, width]`."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        width = _as_matrix(self.stored.shape)[1]
        kind = self.stored.type
        blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, width // kind.block * kind.size)
        return torch.from_numpy(np.array(dequantize(blocks, GGMLQuantizationType[kind.name])))


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return (int(np.prod(shape[:-1])), shape[-1]) if len(shape) > 1 else (1, shape[0])


def gguf_model_config(header: GgufHeader) -> tuple[PreTrainedConfig, GenerationConfig]:
    """Return a file's config and what it says of generating.

    Raises:
        ModelError: a header that makes no sense, or a model that trimkv does not run from GGUF.
    """
    values = gguf_config(header)
    ends = {name: values[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sampling = sampling_of(header)
    generation = GenerationConfig(**ends, **sampling, **({"do_sample": True} if sampling else {}))
    return AutoConfig.for_model(**values), generation


def gguf_weights(
    header: GgufHeader, model: type, config: PreTrainedConfig, dtype: torch.dtype
) -> dict[str, GgufWeight]:
    """Return name → weight of a model of transformers, all of them still in the file.

    Raises:
        ModelError: the package `gguf` is missing.
    """
    names = _names(header, model, config)
    return {
        names[name]: GgufWeight(
            stored, dtype, heads=_paired_heads(header, name, config), offset=_stored_offset(header, name)
        )
        for name, stored in header.tensors.items()
        if name in names
    }


def _names(header: GgufHeader, model: type, config: Any) -> dict[str, str]:
    """Return GGUF name → transformers' name of each parameter."""
    try:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    except ImportError as error:
        raise ModelError(
            f"GGUF files need the package gguf, which cannot be imported: {error}", hint="pip install gguf"
        ) from error
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    known = get_tensor_name_map(architecture, config.num_hidden_layers)
    with torch.device("meta"):
        parameters = list(model(config).state_dict())
    named = {}
    for parameter in parameters:
        owner, _, kind = parameter.rpartition(".")
        stored = known.get_name(owner)
        if stored is not None:
            named[f"{stored}.{kind}"] = parameter
    return named


def _paired_heads(header: GgufHeader, name: str, config: Any) -> int | None:
    """Say how many heads a matrix has whose rows llama.cpp stores in another order: query and key of its `llama`."""
    if header.architecture != "llama":
        return None
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return next((count for part, count in heads.items() if f".{part}." in name), None)


def _stored_offset(header: GgufHeader, name: str) -> float:
    """Return what was added to a tensor when it was stored: Gemma's norms multiply by 1 + weight."""
    return 1.0 if header.architecture.startswith("gemma") and name.endswith("norm.weight") else 0.0


def gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Make the tokenizer that a file holds, with its chat template where it has one.

    Raises:
        BrokenModel: the file holds none.
        UnsupportedModel: one of a kind that transformers does not build.
    """
    said = read_gguf(path, strings=(TOKENS, MERGES)).metadata
    tokens = said.get(TOKENS)
    if not isinstance(tokens, list) or not tokens:
        raise BrokenModel(f"{path} holds no tokenizer", hint="take a file that has one, or the safetensors repository")
    values = {
        "tokenizer_type": said.get("tokenizer.ggml.model"),
        "pre_tokenizer_type": said.get("tokenizer.ggml.pre"),
        "tokens": tokens,
        "merges": said.get(MERGES),
        "scores": said.get("tokenizer.ggml.scores"),
        "token_type": said.get("tokenizer.ggml.token_type"),
        "add_prefix_space": said.get("tokenizer.ggml.add_space_prefix"),
        **{f"{short}_id": said.get(f"tokenizer.ggml.{long}_token_id") for short, long in _SPECIAL.items()},
    }
    try:
        backend, more = _convert_tokenizer(
            said["general.architecture"], {key: value for key, value in values.items() if value is not None}
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UnsupportedModel(
            f"{path}: its tokenizer ({values['tokenizer_type']}) cannot be built: {error}",
            hint="take the safetensors repository",
        ) from error
    flags = _flags(said)
    special = {
        name: tokens[token_id]
        for name, key in _SPECIAL.items()
        if (token_id := said.get(f"tokenizer.ggml.{key}_token_id")) is not None and token_id < len(tokens)
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{**more, **special, **flags})
    tokenizer.chat_template = said.get("tokenizer.chat_template")
    return tokenizer


def _convert_tokenizer(architecture: str, values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Have transformers make a tokenizer of a file's values.

    Raises:
        UnsupportedModel: what does so is not where it is known to be.
    """
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer
    except ImportError:
        raise unknown_form("it has no convert_gguf_tokenizer") from None
    made: tuple[Any, dict[str, Any]] = convert_gguf_tokenizer(architecture, values)
    return made


def _flags(said: Mapping[str, Any]) -> dict[str, Any]:
    """Say what is put before and after a text: a SentencePiece vocabulary has a BOS unless it says otherwise."""
    flags = {name: said.get(f"tokenizer.ggml.{name}") for name in _FLAGS}
    if said.get("tokenizer.ggml.model") == "llama" and flags["add_bos_token"] is None:
        flags["add_bos_token"] = True
    return {name: bool(value) for name, value in flags.items() if value is not None}
