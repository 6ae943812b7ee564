"""What a gate folder tells about its gates, without a model beside it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from torch import Tensor

from trimkv_cli.cache.gate_files import gate_files, read_gates
from trimkv_cli.plan import Warning
from trimkv_cli.spec import GateSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBias:
    """The range of one layer's per-head biases: 18 forgets almost nothing, 0 halves a token's value at each step."""

    layer: int
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GateFacts:
    """A gate folder, measured."""

    gate: GateSpec
    hidden_act: str
    layers: tuple[LayerBias, ...]
    hidden_size: int | None
    num_kv_heads: int | None
    dtypes: tuple[str, ...]
    file: Path
    file_bytes: int
    sha256: str
    warnings: tuple[Warning, ...]


def gate_facts(folder: Path, *, id: str) -> GateFacts:
    """Read a gate folder and measure what is in it; raises as `read_gates` does."""
    gate, tensors, hidden_act, warnings = read_gates(folder, id=id)
    _, file = gate_files(folder)
    return GateFacts(
        gate=gate,
        hidden_act=hidden_act,
        layers=tuple(_biases(tensors)),
        hidden_size=_width(tensors, r"linear1\.weight", axis=1),
        num_kv_heads=_width(tensors, r"retention_gate\.bias", axis=0),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        file=file,
        file_bytes=file.stat().st_size,
        sha256=_sha256(file),
        warnings=warnings,
    )


def _biases(tensors: Mapping[str, Tensor]) -> Iterator[LayerBias]:
    found = [(re.search(r"layers\.(\d+)\..*retention_gate\.bias$", key), tensor) for key, tensor in tensors.items()]
    biases = [(int(match[1]), tensor) for match, tensor in found if match and tensor.numel()]
    for layer, bias in sorted(biases, key=itemgetter(0)):
        yield LayerBias(layer=layer, lowest=bias.float().min().item(), highest=bias.float().max().item())


def _width(tensors: Mapping[str, Tensor], name: str, *, axis: int) -> int | None:
    shapes = (tensor.shape for key, tensor in tensors.items() if re.search(f"{name}$", key))
    return next((shape[axis] for shape in shapes if len(shape) > axis), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
