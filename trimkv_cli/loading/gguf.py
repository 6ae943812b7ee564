"""A GGUF file as transformers' config, tokenizer and weights; what each stored tensor becomes is decided here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
from trimkv_cli.model.gguf import MERGES, TOKENS, VOCABULARY, GgufHeader, GgufTensor, TensorType, read_gguf
from trimkv_cli.model.gguf_config import gguf_config, sampling_of
from trimkv_cli.model.packing import GROUP, Form, form_of, rows_at_once

_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_FLAGS = ("add_bos_token", "add_eos_token")


@dataclass(frozen=True, slots=True)
class GgufWeight:
    """Stand for one stored tensor; `[...]` reads and unpacks it, in the order of rows that transformers has."""

    stored: GgufTensor
    dtype: torch.dtype
    heads: int | None = None  # whose rows are stored in pairs of the two halves that a rotation mixes
    offset: float = 0.0  # that was added when it was stored
    is_vocab: bool = False  # one row for each token

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.stored.shape)

    @property
    def form(self) -> Form:
        """What it is held as where a CPU multiplies it as it lies."""
        return form_of(self.stored.type.name, self.stored.shape, is_vocab=self.is_vocab)

    def is_floating_point(self) -> bool:
        return True

    def __getitem__(self, _: EllipsisType) -> Tensor:
        rows, width = _as_matrix(self.stored.shape)
        made = torch.empty(rows, width, dtype=self.dtype)
        start = 0
        for part in self.parts():
            made[start : start + len(part)] = part
            start += len(part)
        if self.offset:
            made -= self.offset
        return made.view(self.shape)

    def parts(self) -> Iterator[Tensor]:
        """Read and unpack some rows at a time, `[rows, width]`."""
        for blocks in self._blocks():
            yield self._in_order(self._unpack(blocks))

    def levels(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Read some rows at a time of what is int4: as `quantise_int4` returns them, without loss."""
        for blocks in self._blocks():
            codes, scale, zero = map(self._in_order, _levels(blocks, self.stored.type))
            yield codes, scale, zero

    def _in_order(self, rows: Tensor) -> Tensor:
        """Return whole heads' rows, their two halves one after the other."""
        if self.heads is None:
            return rows
        half = self.shape[0] // self.heads // 2
        return rows.view(-1, half, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)

    def _blocks(self) -> Iterator[Tensor]:
        """Read the tensor, some rows `[rows, bytes of a row]` at a time."""
        rows, width = _as_matrix(self.stored.shape)
        row_bytes = width // self.stored.type.block * self.stored.type.size
        at_once = rows_at_once(width, 1 if self.heads is None else rows // self.heads)
        with self.stored.path.open("rb") as file:
            file.seek(self.stored.offset)
            for start in range(0, rows, at_once):
                blocks = torch.empty(min(at_once, rows - start), row_bytes, dtype=torch.uint8)
                data: Any = blocks.numpy()
                if file.readinto(data) != blocks.nbytes:
                    raise BrokenModel(f"{self.stored.path} is cut off", hint="get the file again")
                yield blocks

    def _unpack(self, rows: Tensor) -> Tensor:
        """Return the values of whole rows `[rows, width]`; gguf-py is asked for those of rarer types, as it is slow."""
        type = self.stored.type
        if type.name in _VALUES:
            return _VALUES[type.name](rows.view(-1, type.size)).view(len(rows), -1)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return torch.from_numpy(np.array(dequantize(rows.numpy(), GGMLQuantizationType[type.name])))


def _values_q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_floats(blocks[:, :2]))


def _values_q5_0(blocks: Tensor) -> Tensor:
    """The second four bytes have the fifth bits of a block's 32 values."""
    low, high = blocks[:, 6:], blocks[:, 2:6].contiguous().view(torch.int32)
    fifth = (high >> torch.arange(32, dtype=torch.int32)).to(torch.uint8).bitwise_and_(1).bitwise_left_shift_(4)
    codes = torch.cat((low & 15, low >> 4), dim=1).bitwise_or_(fifth)
    return codes.view(torch.int8).sub_(16).float().mul_(_floats(blocks[:, :2]))


def _values_q6_k(blocks: Tensor) -> Tensor:
    """Each half of a block has 64 bytes of low bits and 32 of high bits, for four times 32 values in turns."""
    low = blocks[:, :128].contiguous().view(-1, 2, 64)
    high = blocks[:, 128:192].contiguous().view(-1, 2, 32)
    codes = torch.stack((low & 15, low >> 4), dim=2).view(-1, 2, 4, 32)
    for turn, bits in enumerate((high << 4, high << 2, high, high >> 2)):
        codes[:, :, turn].bitwise_or_(bits & 0b110000)
    scales = _floats(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8)
    return codes.view(torch.int8).sub_(32).view(-1, 16, 16).float().mul_(scales[..., None])


# Blocks `[blocks, bytes]` → their values, equal to those of gguf-py.
_VALUES: Mapping[str, Callable[[Tensor], Tensor]] = {"Q8_0": _values_q8_0, "Q5_0": _values_q5_0, "Q6_K": _values_q6_k}


def _levels(rows: Tensor, kind: TensorType) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes `[rows, width]` of four bits, and scales and zero points `[rows, width / GROUP]`."""
    blocks = rows.view(len(rows), -1, kind.size)
    if kind.name == "Q4_K":  # two groups lie in the low and the high halves of the same bytes
        scale, low = _k_scales(blocks)
        packed = blocks[..., 16:].reshape(len(rows), -1, GROUP)
    else:  # the first and the second half of one do
        numbers = _floats(blocks[..., : -GROUP // 2])
        scale, low = numbers[..., 0], numbers[..., 1] if kind.name == "Q4_1" else -8 * numbers[..., 0]
        packed = blocks[..., -GROUP // 2 :]
    codes = torch.stack((packed & 15, packed >> 4), dim=2)
    return codes.view(len(rows), -1), scale, low + 8 * scale


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and lowest weight of each of the eight groups in blocks of Q4_K `[rows, blocks, bytes]`.

    Two halves, then twelve bytes that hold eight scales and eight minima of six bits: four of each in the low bits of
    the first eight bytes, the others' low four bits in the last four, and their high two bits in the first eight's.
    """
    whole = _floats(blocks[..., :4])
    low, high, rest = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = torch.cat((low & 63, (rest & 15) | (low >> 6 << 4)), dim=-1)
    minima = torch.cat((high & 63, (rest >> 4) | (high >> 6 << 4)), dim=-1)
    scale, minimum = whole[..., :1] * scales, whole[..., 1:] * minima
    return scale.flatten(1), -minimum.flatten(1)


def _floats(halves: Tensor) -> Tensor:
    """Return numbers of two bytes each."""
    return halves.contiguous().view(torch.float16).float()


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
            stored,
            dtype,
            heads=_paired_heads(header, name, config),
            offset=_stored_offset(header, name),
            is_vocab=name in VOCABULARY,
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
