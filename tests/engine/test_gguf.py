"""Models from GGUF files: the weights that llama.cpp stored, the tokens that transformers generates."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import tiny_tokenizers
from helpers.gguf_files import ARCHITECTURES, write_gguf
from trimkv_cli.engine.engine import Engine
from trimkv_cli.errors import ModelError
from trimkv_cli.loading.gguf import gguf_model_config, gguf_tokenizer
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.model.folders import read_model_spec
from trimkv_cli.model.gguf import read_gguf
from trimkv_cli.request import Request, SamplingParams

PROMPT = [70, 81, 92, 103, 114, 125, 136, 147, 158, 169, 180, 191]


def load(path: Path) -> Engine:
    return load_engine(
        EngineOptions(
            model=str(path), gates="none", kv_budget="200", dtype="fp32", threads=1, device="cpu", quantize="none"
        )
    )


def generate(model: Any) -> list[int]:
    model.generation_config.eos_token_id = None
    made = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False)
    return made[0, len(PROMPT) :].tolist()


def answer(path: Path) -> list[int]:
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    engine = load(path)
    made = engine.generate([Request(id="a", prompt_token_ids=tuple(PROMPT), params=params)])
    return [token for event in made for token in event.token_ids]


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_tokens_are_those_of_the_model_that_was_stored(family: str, kind: str, tmp_path: Path) -> None:
    """Catches rows of q and k in llama.cpp's order, an offset that stays in a norm, a block read wrongly."""
    model = write_gguf(tmp_path / "tiny.gguf", family, kind=kind)
    assert answer(tmp_path / "tiny.gguf") == generate(model)


def test_tokens_are_those_that_transformers_generates_from_the_same_file(tmp_path: Path) -> None:
    """Catches a file that only our own writer and reader agree on."""
    write_gguf(tmp_path / "tiny.gguf", "llama", kind="Q4_1")
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file="tiny.gguf", dtype=torch.float32)
    assert answer(tmp_path / "tiny.gguf") == generate(theirs.eval())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_tokenizer_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    """Catches special tokens that are lost, and a template that is not taken over."""
    write_gguf(tmp_path / "tiny.gguf", family, template=tiny_tokenizers.CHATML)
    theirs, ours = (
        AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="tiny.gguf"),
        gguf_tokenizer(tmp_path / "tiny.gguf"),
    )
    for text in ("the quick brown fox", "naïve <|end|> café", "  a\n\nb"):
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours.chat_template == tiny_tokenizers.CHATML
    assert ours.eos_token == "<|end|>"


def test_llama_3_factors_are_found_again(tmp_path: Path) -> None:
    """Catches rotations without the factors that a file of Llama 3 holds as a tensor."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = write_gguf(
        tmp_path / "plain.gguf",
        "llama",
        rope_parameters={**scaling, "original_max_position_embeddings": 8192, "rope_theta": 500000.0},
        head_dim=64,
    )
    plain = 1.0 / (500000.0 ** (torch.arange(0, 64, 2).float() / 64))
    factors = (plain / model.model.rotary_emb.inv_freq).numpy()
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    writer = gguf.GGUFWriter(tmp_path / "scaled.gguf", "llama")
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config, _ = gguf_model_config(read_gguf(tmp_path / "scaled.gguf"))
    with torch.device("meta"):
        rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    assert config.rope_parameters["factor"] == 8.0
    found = type(rotary)(config).inv_freq
    assert torch.allclose(found, model.model.rotary_emb.inv_freq, rtol=1e-5)


def split(path: Path, first: int) -> list[Path]:
    """Write a file as two parts, as llama.cpp's gguf-split does; the second has no values of the model."""
    reader, parts = gguf.GGUFReader(path), []
    for number, tensors in enumerate((reader.tensors[:first], reader.tensors[first:])):
        part = path.with_name(f"tiny-{number + 1:05}-of-00002.gguf")
        writer = gguf.GGUFWriter(part, "llama")
        for field in reader.fields.values() if number == 0 else ():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(part)
    return parts


def test_the_parts_of_a_split_file_are_one_model(tmp_path: Path) -> None:
    """Catches tensors of a second part that are missed, and a part that is not there or not the first."""
    model = write_gguf(tmp_path / "tiny.gguf", "llama", kind="Q8_0")
    first, second = split(tmp_path / "tiny.gguf", 9)
    assert answer(first) == generate(model)
    with pytest.raises(ModelError, match="is not the first of its 2 parts") as caught:
        read_model_spec(second)
    assert str(first) in str(caught.value.hint)
    second.unlink()
    with pytest.raises(ModelError, match=r"tiny-00002-of-00002\.gguf is missing"):
        read_model_spec(first)


def cut(data: bytes) -> bytes:
    return data[:-100]


def cut_in_header(data: bytes) -> bytes:
    return data[:200]


def big_endian(data: bytes) -> bytes:
    return data[:4] + struct.pack(">I", 3) + data[8:]


def wrong_magic(data: bytes) -> bytes:
    return b"GGML" + data[4:]


def later_version(data: bytes) -> bytes:
    return data[:4] + struct.pack("<I", 9) + data[8:]


def unknown_type(data: bytes) -> bytes:
    name = b"blk.0.ffn_down.weight"
    at = data.index(name) + len(name) + 4 + 16
    return data[:at] + struct.pack("<I", 77) + data[at + 4 :]


def more_heads(data: bytes) -> bytes:
    name = b"llama.attention.head_count"
    at = data.index(name) + len(name) + 4
    return data[:at] + struct.pack("<I", 8) + data[at + 4 :]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "is cut off"),
        (cut_in_header, "cut off within its header"),
        (big_endian, "big-endian"),
        (wrong_magic, "not a GGUF file"),
        (later_version, "GGUF version 9"),
        (unknown_type, r"blk\.0\.ffn_down\.weight is of tensor type 77"),
        (more_heads, r"blk\.0\.attn_output\.weight is 64 × 64"),
    ],
)
def test_a_damaged_file_is_named_before_weights_are_read(
    damage: Callable[[bytes], bytes], said: str, tmp_path: Path
) -> None:
    """Catches an error of numpy or struct instead of one line with file and field."""
    write_gguf(tmp_path / "tiny.gguf", "llama")
    path = tmp_path / "broken.gguf"
    path.write_bytes(damage((tmp_path / "tiny.gguf").read_bytes()))
    with pytest.raises(ModelError, match=said) as caught:
        read_model_spec(path)
    assert caught.value.hint
    assert str(path) in caught.value.message
