"""GGUF files: what their headers say of a model and of each tensor. Plain Python; no weight is read.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package reads headers too, but takes
seconds for a vocabulary.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from trimkv_cli.errors import BrokenModel, UnsupportedModel
from trimkv_cli.model.packing import Packing, Tensors, form_of

MAGIC = b"GGUF"
_HEAD = "output.weight"
VOCABULARY = ("token_embd.weight", _HEAD)
TOKENS, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
_AGAIN = "get the file again"
_VERSIONS = (2, 3)
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 32  # of a string or an array: more is nonsense


class TensorType(NamedTuple):
    """How values are stored: `size` bytes hold a block of `block` values."""

    name: str
    block: int
    size: int


_TYPES: Mapping[int, TensorType] = {
    number: TensorType(*kind)
    for number, kind in {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82),
        23: ("IQ4_XS", 256, 136),
        29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2),
        34: ("TQ1_0", 256, 54),
        35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17),
    }.items()
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """Where a tensor lies in a file, and what it is; `shape` as torch has it, the last dimension stored together."""

    path: Path
    offset: int
    type: TensorType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) // self.type.block * self.type.size


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What a GGUF file, or the first of several that are one model, says before its weights.

    Arrays of strings are only counted in `metadata` unless they were asked for.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def get(self, key: str, default: Any = None) -> Any:
        """Return what the file says under `key`, which is the architecture's own."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def stored_packing(header: GgufHeader) -> Packing:
    """Say what the tensors of a file become where they stay packed."""
    names = sorted(header.tensors, key=_HEAD.__eq__)
    kinds = [(header.tensors[name].type.name, header.tensors[name].shape, name) for name in names]
    return Packing.of(block_tensors(type, shape, is_vocab=name in VOCABULARY) for type, shape, name in kinds)


def block_tensors(type: str, shape: tuple[int, ...], *, count: int = 1, is_vocab: bool = False) -> Tensors:
    """Describe tensors of a block type where they stay packed.

    Raises:
        UnsupportedModel: a type that nothing here reads.
    """
    kind = next((known for known in _TYPES.values() if known.name == type), None)
    if kind is None:
        known = ", ".join(kind.name for kind in _TYPES.values())
        raise UnsupportedModel(f"{type} is no tensor type that trimkv reads", hint=f"known: {known}")
    form = form_of(type, shape, is_vocab=is_vocab)
    return Tensors(label=type, shape=shape, form=form, count=count, is_vocab=is_vocab)


def is_gguf(path: Path) -> bool:
    """Say whether a file is GGUF: by its magic, as blobs have no ending."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path, *, strings: Container[str] = ()) -> GgufHeader:
    """Read a file's header, and those of its other parts; `strings` are the arrays of strings to keep.

    Raises:
        BrokenModel: not GGUF, cut off, of another byte order, or without its other parts.
        UnsupportedModel: a version or a tensor type that nothing here reads.
    """
    metadata, tensors = _read_file(path, strings)
    parts = metadata.get("split.count", 1)
    if parts > 1:
        for other in _other_parts(path, parts):
            tensors |= _read_file(other, ())[1]
        expected = metadata.get("split.tensors.count", len(tensors))
        if len(tensors) != expected:
            raise BrokenModel(f"{path} and its parts hold {len(tensors)} of {expected} tensors", hint=_AGAIN)
    if not isinstance(metadata.get("general.architecture"), str):
        raise BrokenModel(f"{path}: general.architecture is missing", hint=_AGAIN)
    return GgufHeader(path=path, metadata=metadata, tensors=tensors)


def gguf_files(path: Path) -> list[Path]:
    """Return a file, or all the parts beside one that is named as the first of several."""
    named = _SPLIT.fullmatch(path.name)
    if named is None:
        return [path]
    parts = range(1, int(named["parts"]) + 1)
    files = [path.with_name(f"{named['stem']}-{part:05}-of-{named['parts']}.gguf") for part in parts]
    return [file for file in files if file.is_file()]


def _other_parts(path: Path, parts: int) -> list[Path]:
    named = _SPLIT.fullmatch(path.name)
    if named is None or int(named["parts"]) != parts:
        raise BrokenModel(
            f"{path} is one of {parts} parts, and its name does not say which",
            hint=f"name them NAME-00001-of-{parts:05}.gguf and so on, and give the first",
        )
    if int(named["part"]) != 1:
        first = path.with_name(f"{named['stem']}-00001-of-{parts:05}.gguf")
        raise BrokenModel(f"{path} is not the first of its {parts} parts", hint=f"give {first}")
    others = [path.with_name(f"{named['stem']}-{part:05}-of-{parts:05}.gguf") for part in range(2, parts + 1)]
    missing = [other for other in others if not other.is_file()]
    if missing:
        raise BrokenModel(f"{path} is the first of {parts} parts, and {missing[0].name} is missing", hint=_AGAIN)
    return others


def _read_file(path: Path, strings: Container[str]) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    with path.open("rb") as file:
        try:
            return _Reader(file, path).read(strings)
        except (struct.error, EOFError):
            raise BrokenModel(f"{path} is cut off within its header", hint=_AGAIN) from None
        except (UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise BrokenModel(f"{path}: the header makes no sense: {error}", hint=_AGAIN) from None


class _Reader:
    """One file's header, read from front to back."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path

    def read(self, strings: Container[str]) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        num_tensors, num_values = self._check_beginning()
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self.string()
            metadata[key] = self.value(self.number("I"), keep=key in strings)
        entries = [self.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise BrokenModel(f"{self.path}: general.alignment = {alignment!r} is no alignment", hint=_AGAIN)
        start = -(-self.file.tell() // alignment) * alignment
        tensors = {
            name: GgufTensor(path=self.path, offset=start + offset, type=self._type(name, number), shape=shape)
            for name, shape, number, offset in entries
        }
        self._check_end(tensors)
        return metadata, tensors

    def _check_beginning(self) -> tuple[int, int]:
        """Return how many tensors and how many values the header lists."""
        beginning = self.file.read(4)
        if beginning != MAGIC:
            raise BrokenModel(
                f"{self.path} is not a GGUF file: it begins with {beginning!r}", hint="give a file that is one"
            )
        version = self.number("I")
        if version & 0xFFFF == 0:
            raise UnsupportedModel(
                f"{self.path} is a big-endian GGUF file, which trimkv does not read", hint="take a little-endian one"
            )
        if version not in _VERSIONS:
            known = " and ".join(map(str, _VERSIONS))
            raise UnsupportedModel(
                f"{self.path} is GGUF version {version}; trimkv reads {known}", hint="convert the model again"
            )
        return self.number("Q"), self.number("Q")

    def _type(self, name: str, number: int) -> TensorType:
        if number not in _TYPES:
            known = ", ".join(kind.name for kind in _TYPES.values())
            raise UnsupportedModel(
                f"{self.path}: {name} is of tensor type {number}, which trimkv does not read", hint=f"known: {known}"
            )
        return _TYPES[number]

    def _check_end(self, tensors: Mapping[str, GgufTensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.shape and tensor.shape[-1] % tensor.type.block:
                raise BrokenModel(
                    f"{self.path}: {name} has rows of {tensor.shape[-1]}, which are no whole blocks of"
                    f" {tensor.type.block} ({tensor.type.name})",
                    hint=_AGAIN,
                )
        end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=0)
        size = self.path.stat().st_size
        if size < end:
            raise BrokenModel(f"{self.path} is cut off: {size:,} of {end:,} bytes", hint=_AGAIN)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read name, shape, number of the type and offset of one tensor."""
        name = self.string()
        dimensions = self.numbers("Q", self.number("I"))
        return name, tuple(reversed(dimensions)), self.number("I"), self.number("Q")

    def value(self, kind: int, *, keep: bool) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise BrokenModel(f"{self.path}: a value of type {kind} is none that GGUF knows", hint=_AGAIN)
        inner, count = self.number("I"), self.number("Q")
        if inner in _NUMBERS:
            return self.numbers(_NUMBERS[inner], count)
        read: Callable[[], Any] = self.string if inner == _STRING else lambda: self.value(inner, keep=keep)
        if keep or inner != _STRING:
            return [read() for _ in range(count)]
        for _ in range(count):
            self.take(self.number("Q"))
        return count

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def number(self, form: str) -> Any:
        return self.numbers(form, 1)[0]

    def numbers(self, form: str, count: int) -> list[Any]:
        if count > _LONGEST:
            raise OverflowError(f"{count:,} numbers in one place")
        layout = struct.Struct(f"<{count}{form}")
        return list(layout.unpack(self.take(layout.size)))

    def take(self, count: int) -> bytes:
        if count > _LONGEST:
            raise OverflowError(f"{count:,} bytes in one place")
        data = self.file.read(count)
        if len(data) != count:
            raise EOFError
        return data
