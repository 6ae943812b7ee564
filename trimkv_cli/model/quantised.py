"""Quantised checkpoints: the methods, what each stores, and what it takes to run it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from typing import Any, Self

from trimkv_cli.errors import BrokenModel, ModelError, UnsupportedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What runs checkpoints of one `quant_method`."""

    packages: tuple[str, ...] = ()  # as they are imported
    needs_gpu: bool = False
    unpacks: bool = False  # plain matrices are made of them while they are read
    streams: bool = True  # tensors can be handed over one by one; else the library reads the files itself


METHODS: Mapping[str, Method] = {
    "bitsandbytes": Method(packages=("bitsandbytes", "accelerate")),
    "awq": Method(packages=("gptqmodel", "accelerate"), needs_gpu=True, streams=False),
    "gptq": Method(packages=("optimum", "gptqmodel", "accelerate"), needs_gpu=True, streams=False),
    "compressed-tensors": Method(packages=("compressed_tensors",), unpacks=True),
    "fp8": Method(packages=("accelerate",), unpacks=True),
    "mxfp4": Method(packages=("accelerate",), unpacks=True),
    "torchao": Method(packages=("torchao",), streams=False),
}
_REFUSED: Mapping[str, str] = {"hqq": "transformers 5 does not load it"}
_BLOCK = {"bitsandbytes": 64, "mxfp4": 32}  # weights that share a scale, where no key says how many
_KEY = "quantization_config"
_Headers = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """A checkpoint that was stored quantised; its bytes are exact once its headers were read."""

    method: str
    bits: int | None
    stored_bytes: int
    repacked_bytes: int | None = None  # nf4 on a CPU with bf16 instructions, which lays it out anew

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, weight_numel: int, vocab_numel: int, dtype_bytes: int) -> Self:
        """Read what config.json says, and estimate the bytes: all but the embeddings in so many bits, and the scales.

        Raises:
            UnsupportedModel: a method that trimkv does not run.
            BrokenModel: a key that is missing or has a value that makes no sense.
        """
        settings = config[_KEY]
        method = _method(settings)
        bits = _bits(method, settings)
        block = _group(settings) or _BLOCK.get(method)
        scales = 16 / block if block else 0.0
        packed = weight_numel - vocab_numel
        stored = vocab_numel * dtype_bytes + int(packed * ((bits or 8 * dtype_bytes) + scales) / 8)
        return cls(method=method, bits=bits, stored_bytes=stored)

    def with_headers(self, tensors: _Headers, *, skipped: tuple[str, ...] = ()) -> Self:
        """Count the tensors that are stored, but those `skipped`."""
        sizes = {name: _tensor_bytes(name, *entry) for name, entry in tensors.items() if name not in skipped}
        stored = sum(sizes.values())
        repacked = stored
        if self.method == "bitsandbytes" and self.bits == _FOUR_BITS:
            repacked -= sum(size for name, size in sizes.items() if _SCALES.search(name))
            repacked += sum(_repacked_scales(tensors))
        return type(self)(method=self.method, bits=self.bits, stored_bytes=stored, repacked_bytes=repacked)

    @property
    def unpacks(self) -> bool:
        return METHODS[self.method].unpacks

    @property
    def streams(self) -> bool:
        return METHODS[self.method].streams

    @property
    def label(self) -> str:
        """Name method and bits as people do: "bitsandbytes 4-bit"."""
        return self.method if self.bits is None else f"{self.method} {self.bits}-bit"

    def ensure_installed(self) -> None:
        """Raise where a package is missing.

        Raises:
            ModelError: with the command that installs what is missing.
        """
        missing = [name.replace("_", "-") for name in METHODS[self.method].packages if find_spec(name) is None]
        if missing:
            raise ModelError(
                f"a checkpoint in {self.label} needs {' and '.join(missing)}, not installed here",
                hint=f"pip install {' '.join(missing)}, or take the model's original weights",
            )

    def ensure_runs(self, device: str) -> None:
        """Raise where this machine lacks what the method needs; `device` is cpu, cuda or mps.

        Raises:
            ModelError: a package is missing.
            UnsupportedModel: it needs another device.
        """
        self.ensure_installed()
        if METHODS[self.method].needs_gpu and device != "cuda":
            raise UnsupportedModel(
                f"a checkpoint in {self.label} needs a GPU with CUDA, not {device}",
                hint="take the model's original weights, or a GGUF file of it",
            )


_FOUR_BITS = 4
_SCALES = re.compile(r"\.(absmax|nested_absmax|nested_quant_map)$")
_RECORD = re.compile(r"\.quant_state\.bitsandbytes__\w+$|\.weight_format$|rotary_emb\.inv_freq$")
_WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}  # all others are one byte


def _tensor_bytes(name: str, dtype: str, shape: tuple[int, ...]) -> int:
    """Count a stored tensor; a record that is read and not kept counts nothing."""
    return 0 if _RECORD.search(name) else prod(shape) * _WIDTHS.get(dtype, 1)


def _repacked_scales(tensors: _Headers) -> Iterator[int]:
    """Yield the bytes of each matrix's scales once they are in 16 bits, nested ones no more."""
    for name, (_, shape) in tensors.items():
        if name.endswith(".absmax"):
            yield 2 * prod(shape)


def _method(settings: object) -> str:
    if not isinstance(settings, Mapping):
        raise BrokenModel(f"config.json: {_KEY} = {settings!r} is not an object", hint="get the folder again")
    said = settings.get("quant_method")
    known = said is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit"))
    method = "bitsandbytes" if known else str(said)
    if method not in METHODS:
        why = f": {_REFUSED[method]}" if method in _REFUSED else ""
        raise UnsupportedModel(
            f"config.json: {_KEY}.quant_method = {said!r} is not one that trimkv runs{why}",
            hint=f"one of {', '.join(METHODS)}; or take the model's original weights",
        )
    return method


def _bits(method: str, settings: Mapping[str, Any]) -> int | None:
    """Say how many bits a packed weight has, where the config says it."""
    if method == "bitsandbytes":
        return _FOUR_BITS if settings.get("load_in_4bit") else 8
    if method in ("fp8", "mxfp4"):
        return 8 if method == "fp8" else _FOUR_BITS
    if method == "torchao":
        found = re.search(r"(?:int|float|uint|fp)(\d)", str(settings.get("quant_type")).lower())
        return int(found[1]) if found else None
    wanted = [settings.get(key) for key in ("bits", "w_bit")] + [group.get("num_bits") for group in _groups(settings)]
    return next((bits for bits in wanted if isinstance(bits, int)), None)


def _group(settings: Mapping[str, Any]) -> int | None:
    wanted = [settings.get(key) for key in ("group_size", "q_group_size")]
    wanted += [group.get("group_size") for group in _groups(settings)]
    return next((size for size in wanted if isinstance(size, int) and size > 0), None)


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """List how compressed-tensors stores the weights of each group of layers."""
    groups = settings.get("config_groups")
    found = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") for group in found if isinstance(group, Mapping)]
    return [each for each in weights if isinstance(each, Mapping)]
