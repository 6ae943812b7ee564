"""Weights read from safetensors files one tensor at a time, so that loading holds no second copy of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from trimkv_cli.errors import BrokenModel
from trimkv_cli.folders import StoredTensor, stored_tensors

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """Stand for one stored tensor; `[...]` reads it into memory of its own (a mapped file would count beside it)."""

    stored: StoredTensor

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.stored.dtype]

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.stored.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, _: EllipsisType) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        data: Any = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with self.stored.path.open("rb") as file:
            file.seek(self.stored.offset)
            read = file.readinto(data)
        if read != len(data):
            raise BrokenModel(f"{self.stored.path} is cut off", hint="get the folder again")
        return tensor


def lazy_tensors(folder: Path) -> dict[str, LazyTensor]:
    """Return name → stored tensor of all safetensors files of a folder.

    Raises:
        BrokenModel: a file that is cut off, or whose header makes no sense.
    """
    wanted = _weight_files(folder)
    return {name: LazyTensor(tensor) for name, tensor in stored_tensors(folder).items() if tensor.path.name in wanted}


def _weight_files(folder: Path) -> set[str]:
    """Name the files that make up the model, as transformers does: an index, else the one, else all."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return set(json.loads(index.read_bytes())["weight_map"].values())
    single = folder / "model.safetensors"
    return {path.name for path in ([single] if single.is_file() else folder.glob("*.safetensors"))}
