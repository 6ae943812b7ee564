"""Folders of models and of gates: their configs and headers, without reading a weight."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from trimkv_cli.errors import BrokenModel, ModelNotFound
from trimkv_cli.model.gguf import read_gguf, stored_packing
from trimkv_cli.model.gguf_config import gguf_config
from trimkv_cli.model.other_gates import fastkvzip_file, fastkvzip_gate, kvzap_gate
from trimkv_cli.model.spec import STORED_DTYPES, GateSpec, GgufForm, ModelSpec

_AGAIN = "get the folder again"


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises:
        ModelNotFound: no such folder, or no config.json in it.
        BrokenModel: not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise ModelNotFound(f"{folder} {what}", hint="give a folder saved by transformers, a hub id or a profile")
    return _json_object(path.read_bytes(), path)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in a file, and what it is; `dtype` as safetensors names it."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Read name → place of all tensors of a folder's *.safetensors files, without reading a weight.

    Raises:
        BrokenModel: a file that is cut off, or whose header makes no sense.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(read_header(path)[0])
    return tensors


def read_safetensors_headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read name → (dtype, shape) of the same tensors; raises as `stored_tensors` does."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in stored_tensors(folder).items()}


def language_tensors(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return the tensors of a multimodal model's language model, named as that has them alone."""
    found = ((_LANGUAGE.sub("", name), tensor) for name, tensor in tensors.items() if _LANGUAGE.match(name))
    return {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in found}


# Written as `language_model.model.layers…`, since transformers 4.52 as `model.language_model.layers…`.
_LANGUAGE = re.compile(r"(model\.)?language_model\.(model\.)?|(?=lm_head\.)")
_UNREAD = re.compile(r"^mtp\.|inv_freq")  # a head that predicts more tokens, frequencies: transformers skips them
T = TypeVar("T")


def read_model_spec(folder: Path) -> ModelSpec:
    """Read the spec of a model's folder or GGUF file; the stored tensors say what config.json leaves open.

    Raises:
        ModelError: no model, a broken one, or one that trimkv does not run.
    """
    if folder.is_file():
        return _gguf_spec(folder)
    config = read_config(folder)
    spec = ModelSpec.from_config(config)
    tensors = read_safetensors_headers(folder)
    if config.get("text_config") is not None:
        tensors = language_tensors(tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if not _UNREAD.search(name)}
    skipped = ("lm_head.weight",) if spec.tied else ()
    if spec.quantised is not None:
        return replace(spec, quantised=spec.quantised.with_headers(tensors, skipped=skipped)) if tensors else spec
    stored = sum(prod(shape) for name, (_, shape) in tensors.items() if name not in skipped)
    dtypes = {STORED_DTYPES[dtype] for dtype, _ in tensors.values() if dtype in STORED_DTYPES}
    known = config.get("dtype") or config.get("torch_dtype") or len(dtypes) != 1
    return replace(spec, weight_numel=max(spec.weight_numel, stored), dtype=spec.dtype if known else dtypes.pop())


def _gguf_spec(path: Path) -> ModelSpec:
    header = read_gguf(path)
    spec = ModelSpec.from_config(gguf_config(header))
    stored = sum(prod(tensor.shape) for name, tensor in header.tensors.items() if not name.startswith("rope_"))
    types = ", ".join(dict.fromkeys(tensor.type.name for tensor in header.tensors.values()))
    form = GgufForm(bytes=header.stored_bytes, types=types, packing=stored_packing(header))
    return replace(spec, weight_numel=max(spec.weight_numel, stored), gguf=form)


def read_gate_spec(folder: Path, *, id: str) -> GateSpec:
    """Read what a gate folder of any format, or a file of Fast KVzip, says of itself, without its tensors.

    Raises:
        ModelNotFound: neither gates.json nor config.json nor such a file.
        GateMismatch: gates that trimkv does not run.
    """
    own = folder / "gates.json"
    if own.is_file():
        return GateSpec.from_config(_json_object(own.read_bytes(), own), id=id)
    fast = fastkvzip_file(folder)
    if fast is not None:
        return fastkvzip_gate(fast, id=id)
    config = read_config(folder)
    return kvzap_gate(config, id=id) if config.get("model_type") == "kvzap" else GateSpec.from_config(config, id=id)


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the tensors' places in a safetensors file, and what it says beside them; raises as `stored_tensors` does."""
    header, data_bytes = _header_bytes(path)
    entries = _json_object(header, path)
    said = entries.pop("__metadata__", None) or {}
    try:
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        tensors = {
            name: StoredTensor(
                path, 8 + len(header) + entry["data_offsets"][0], entry["dtype"], tuple(map(int, entry["shape"]))
            )
            for name, entry in entries.items()
        }
    except (LookupError, TypeError, ValueError):
        raise BrokenModel(f"{path}: the header does not describe tensors", hint=_AGAIN) from None
    if end != data_bytes:
        raise BrokenModel(f"{path} is cut off: {data_bytes:,} of {end:,} bytes of tensors", hint=_AGAIN)
    return tensors, said


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """Return a safetensors file's header, and how many bytes follow it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        follow = path.stat().st_size - 8 - length
        if follow < 0 or length == 0:
            raise BrokenModel(f"{path} is cut off or not a safetensors file", hint=_AGAIN)
        return file.read(length), follow


def _json_object(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise BrokenModel(f"{path} is not valid JSON: {error}", hint=_AGAIN) from None
    if not isinstance(value, dict):
        raise BrokenModel(f"{path} is not a JSON object", hint=_AGAIN)
    return value
