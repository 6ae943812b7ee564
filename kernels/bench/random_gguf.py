"""A GGUF file of random weights in the shape of a larger model, as llama.cpp's Q4_K_M would have it.

python -m bench.random_gguf llama-3.2-1b OUT.gguf --tokenizer SmolLM2.gguf

Embedding and output are one matrix of Q6_K; of `ffn_down` and `attn_v` llama.cpp gives the first and the last eighth of
the layers, and every third between, Q6_K; everything else is Q4_K, or Q5_0 and Q8_0 where 256 does not divide a row.
The tokenizer is another file's, whose vocabulary grows by words that no text joins, each with its merge.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter

_STD = 0.02  # of the weights
_WORD = "Ġ"  # what a word begins with
_NORMAL = 1  # the type of a token
_COPIED_IDS = ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")
_COPIED_FLAGS = ("add_bos_token", "add_space_prefix")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Type = GGMLQuantizationType


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What decides the tensors of a model whose embedding is its output head."""

    architecture: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    rope_base: float
    epsilon: float

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], Type]]:
        """Name each tensor with its shape and its type."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "token_embd.weight", (self.vocabulary, self.hidden), _fits(Type.Q6_K, self.hidden)
        yield "output_norm.weight", (self.hidden,), Type.F32
        for layer in range(self.layers):
            better = Type.Q6_K if _more_bits(layer, self.layers) else Type.Q4_K
            norms = {"attn_norm": self.hidden, "ffn_norm": self.hidden}
            if self.architecture == "qwen3":
                norms |= {"attn_q_norm": self.head_dim, "attn_k_norm": self.head_dim}
            for name, width in norms.items():
                yield f"blk.{layer}.{name}.weight", (width,), Type.F32
            matrices = {
                "attn_q": (query, self.hidden, Type.Q4_K),
                "attn_k": (kv, self.hidden, Type.Q4_K),
                "attn_v": (kv, self.hidden, better),
                "attn_output": (self.hidden, query, Type.Q4_K),
                "ffn_gate": (self.inner, self.hidden, Type.Q4_K),
                "ffn_up": (self.inner, self.hidden, Type.Q4_K),
                "ffn_down": (self.hidden, self.inner, better),
            }
            for name, (rows, columns, kind) in matrices.items():
                yield f"blk.{layer}.{name}.weight", (rows, columns), _fits(kind, columns)


_LLAMA_1B: dict[str, Any] = {"hidden": 2048, "inner": 8192, "heads": 32, "kv_heads": 8, "head_dim": 64}
_QWEN_4B: dict[str, Any] = {"hidden": 2560, "inner": 9728, "heads": 32, "kv_heads": 8, "head_dim": 128}
_SMOL: dict[str, Any] = {"hidden": 576, "inner": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64}
_LLAMA: dict[str, Any] = {"architecture": "llama", "epsilon": 1e-5}
SHAPES = {
    "llama-3.2-1b": Shape(**_LLAMA, **_LLAMA_1B, layers=16, vocabulary=128_256, context=131_072, rope_base=500_000.0),
    "qwen3-4b": Shape(
        architecture="qwen3",
        epsilon=1e-6,
        **_QWEN_4B,
        layers=36,
        vocabulary=151_936,
        context=40_960,
        rope_base=1_000_000.0,
    ),
    "smollm2-135m": Shape(**_LLAMA, **_SMOL, layers=30, vocabulary=49_152, context=8192, rope_base=100_000.0),
}


def _more_bits(layer: int, layers: int) -> bool:
    """Say whether llama.cpp gives a layer's most delicate matrices six bits."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _fits(kind: Type, columns: int) -> Type:
    """Return what llama.cpp takes instead where blocks do not divide a row."""
    instead = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}
    return kind if columns % GGML_QUANT_SIZES[kind][0] == 0 else instead[kind]


def write(shape: Shape, tokenizer: Path, out: Path) -> None:
    """Write the file, one tensor after the other."""
    writer = GGUFWriter(out, shape.architecture)
    _say_shape(writer, shape)
    _copy_tokenizer(writer, GGUFReader(tokenizer), shape.vocabulary)
    for name, sizes, kind in shape.tensors():
        if kind is Type.F32:
            writer.add_tensor_info(name, sizes, np.dtype(np.float32), 4 * sizes[0])
        else:
            row_bytes = _row_bytes(sizes[1], kind)
            data = np.dtype(np.uint8)
            writer.add_tensor_info(name, (sizes[0], row_bytes), data, sizes[0] * row_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for _, sizes, kind in shape.tensors():
        writer.write_tensor_data(random_values(sizes, kind, rng))
    writer.close()


def _row_bytes(columns: int, kind: Type) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return columns // block * size


def random_values(sizes: tuple[int, ...], kind: Type, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Return a norm of ones, or the blocks of a matrix `[rows, bytes of a row]` of mean 0 and deviation 0.02."""
    if kind is Type.F32:
        return np.ones(sizes, dtype=np.float32)
    rows, row_bytes = sizes[0], _row_bytes(sizes[1], kind)
    size = GGML_QUANT_SIZES[kind][1]
    blocks = np.frombuffer(rng.bytes(rows * row_bytes), dtype=np.uint8).reshape(-1, size).copy()
    _SCALED[kind](blocks)
    return blocks.reshape(rows, row_bytes)


_MIDDLE = 32  # of a block's scales, which are 16 to 47


def _half(value: float) -> Bytes:
    return np.array([value], dtype=np.float16).view(np.uint8)


def _scale_q4_k(blocks: Bytes) -> None:
    """Scale by d · s and subtract d′ · s, with d′ = 7.5 d, so that the mean is 0; s is of six bits."""
    unit = _STD / np.sqrt(255 / 12) / _MIDDLE
    blocks[:, 0:2], blocks[:, 2:4] = _half(unit), _half(7.5 * unit)
    first, others = 16 + (blocks[:, 4:8] & 31), 16 + (blocks[:, 8:12] & 31)
    blocks[:, 4:8] = blocks[:, 8:12] = first | (others >> 4 << 6)
    blocks[:, 12:16] = (others & 15) | (others << 4)


def _scale_q6_k(blocks: Bytes) -> None:
    """Scale by d · s; s is of eight bits and as often negative, so that the mean is 0."""
    scales = 16 + (blocks[:, 192:208] & 31).astype(np.int8)
    blocks[:, 192:208] = np.where(blocks[:, 192:208] & 128, -scales, scales).view(np.uint8)
    blocks[:, 208:210] = _half(_STD / np.sqrt(4095 / 12) / _MIDDLE)


def _scale_q5_0(blocks: Bytes) -> None:
    """Scale by d, which is as often negative, so that the mean is 0."""
    signs = blocks[:, 1] & 128
    blocks[:, 0:2] = _half(_STD / np.sqrt(1023 / 12))
    blocks[:, 1] |= signs


def _scale_q8_0(blocks: Bytes) -> None:
    blocks[:, 0:2] = _half(_STD / np.sqrt(65535 / 12))


_SCALED: dict[Type, Callable[[Bytes], None]] = {
    Type.Q4_K: _scale_q4_k,
    Type.Q6_K: _scale_q6_k,
    Type.Q5_0: _scale_q5_0,
    Type.Q8_0: _scale_q8_0,
}


def _say_shape(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_name(f"random weights, {shape.architecture}")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_vocab_size(shape.vocabulary)


def _copy_tokenizer(writer: GGUFWriter, source: GGUFReader, vocabulary: int) -> None:
    """Take a tokenizer over, and let its vocabulary grow by pairs of words, which no text has as one piece."""
    known = {name.removeprefix("tokenizer.ggml."): field for name, field in source.fields.items()}
    tokens, types, merges = (list(known[name].contents()) for name in ("tokens", "token_type", "merges"))
    words = [token for token in tokens if token.rfind(_WORD) == 0 and len(token) > 1]
    pairs = ((first, second) for first, second in product(words, words))
    added = list(islice(pairs, vocabulary - len(tokens)))
    writer.add_tokenizer_model(known["model"].contents())
    writer.add_tokenizer_pre(known["pre"].contents())
    writer.add_token_list(tokens + [first + second for first, second in added])
    writer.add_token_types(types + [_NORMAL] * len(added))
    writer.add_token_merges(merges + [f"{first} {second}" for first, second in added])
    for name in _COPIED_IDS:
        writer.add_uint32(f"tokenizer.ggml.{name}", int(known[name].contents()))
    for name in _COPIED_FLAGS:
        writer.add_bool(f"tokenizer.ggml.{name}", bool(known[name].contents()))


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a GGUF file with a byte-level BPE tokenizer")
    given = parser.parse_args()
    write(SHAPES[given.shape], given.tokenizer, given.out)


if __name__ == "__main__":
    main()
