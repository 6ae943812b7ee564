"""Gate folders on disk, in four formats.

Released by the paper's authors: `config.json` and `trimkv_weights.pth`. Our own: `gates.json` and `gates.safetensors`.
Of others: KVzap's `config.json` and `model.safetensors`, and Fast KVzip's `q4_dim16_sink16.pt`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimkv_cli.cache.gates import activation_name, layer_shapes, tensor_key
from trimkv_cli.cache.other_gates import shapes_of_others
from trimkv_cli.cache.tensor_files import (
    AGAIN,
    listed,
    named_tensors,
    one_line,
    read_json,
    read_pickle,
    read_safetensors,
)
from trimkv_cli.errors import GateMismatch, ModelNotFound, TrimkvError
from trimkv_cli.events import Notice
from trimkv_cli.files import whole_file, writing
from trimkv_cli.model.other_gates import (
    FASTKVZIP_FILES,
    HINT,
    KVZAP_CONFIG,
    KVZAP_WEIGHTS,
    check_fit,
    fastkvzip_file,
    fastkvzip_gate,
    is_kvzap,
    kvzap_gate,
    named_after,
)
from trimkv_cli.model.spec import TRAINED_VARIANTS, GateSpec, ModelSpec

FORMAT_VERSION = 1
OWN_CONFIG, OWN_WEIGHTS = "gates.json", "gates.safetensors"
RELEASED_CONFIG, RELEASED_WEIGHTS = "config.json", "trimkv_weights.pth"
FIRST_LAYER = r"linear1\.weight|gate_proj\.weight|layers\.\d+\.(0\.)?weight|q_proj\.weight"
BIAS = r"retention_gate\.bias|layers\.\d+(\.2)?\.bias|^\d+\.b"
_FORMATS = (
    f"a gate folder has {OWN_CONFIG} and {OWN_WEIGHTS}, {RELEASED_CONFIG} and {RELEASED_WEIGHTS} (or, of KVzap,"
    f" {KVZAP_WEIGHTS}), or {FASTKVZIP_FILES}"
)


class GateFiles(NamedTuple):
    """What a gate folder holds."""

    gate: GateSpec
    tensors: dict[str, Tensor]
    hidden_act: str
    warnings: tuple[Notice, ...]


def read_gates(folder: str | Path, *, id: str | None = None) -> GateFiles:
    """Read a gate folder of any format, or a file of Fast KVzip; `id` is the name to report, else the folder's.

    Raises:
        ModelNotFound: the folder holds no gates.
        GateMismatch: a file is damaged, would run code, or describes gates that trimkv does not run.
    """
    folder = Path(folder)
    id = id or folder.resolve().name
    if is_kvzap(folder) and not (folder / OWN_WEIGHTS).is_file():
        return _read_kvzap(folder, id=id)
    fast = fastkvzip_file(folder)
    if fast is not None:
        return _read_fastkvzip(fast, id=id)
    config_file, weights = gate_files(folder)
    config, is_own = read_json(config_file), weights.name == OWN_WEIGHTS
    tensors = read_safetensors(weights) if is_own else named_tensors(read_pickle(weights), weights)
    if config_file.name == OWN_CONFIG and config.get("format_version") != FORMAT_VERSION:
        found = config.get("format_version")
        raise GateMismatch(
            f"{config_file}: format_version is {found!r}, this trimkv reads {FORMAT_VERSION}", hint="update trimkv"
        )
    gate = _describe(config, tensors, where=config_file, id=id)
    return GateFiles(
        gate=gate,
        tensors=tensors,
        hidden_act=activation_name(config),
        warnings=tuple(_warnings(config, gate, config_file)),
    )


def write_gates(
    folder: str | Path,
    gate: GateSpec,
    tensors: Mapping[str, Tensor],
    *,
    hidden_act: str = "silu",
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder in our own format; each file appears whole or not at all.

    `training` is the record of how the gates were made; it is kept as it is and read by nobody but people.
    """
    # safetensors refuses tensors that share memory, and rg10's linear3 is one for all layers.
    own = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    config = {
        "format_version": FORMAT_VERSION,
        "trained_context": gate.trained_context,
        **_config(gate, tensors, hidden_act),
        **({"training": dict(training)} if training else {}),
    }
    _write(Path(folder) / OWN_WEIGHTS, lambda path: save_file(own, path))
    _write(Path(folder) / OWN_CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def write_released(
    folder: str | Path, gate: GateSpec, tensors: Mapping[str, Tensor], *, hidden_act: str = "silu"
) -> None:
    """Write a folder as the paper's authors release them; each file appears whole or not at all."""
    config = {"max_seq_len": gate.trained_context, **_config(gate, tensors, hidden_act)}
    plain = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
    _write(Path(folder) / RELEASED_WEIGHTS, lambda path: torch.save(plain, path))
    _write(Path(folder) / RELEASED_CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def _read_kvzap(folder: Path, *, id: str) -> GateFiles:
    path = folder / KVZAP_WEIGHTS
    if not path.is_file():
        raise ModelNotFound(f"{folder} lacks {KVZAP_WEIGHTS}", hint=AGAIN)
    gate = kvzap_gate(read_json(folder / KVZAP_CONFIG), id=id)
    return GateFiles(gate=gate, tensors=read_safetensors(path), hidden_act="gelu", warnings=())


def _read_fastkvzip(path: Path, *, id: str) -> GateFiles:
    """Read a file that holds, beside the gates, numbers of their training as numpy's arrays."""
    content = read_pickle(path, allowed=torch.serialization.safe_globals(_numpy_classes()))
    layers = content.get("module")
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, dict) for layer in layers):
        raise GateMismatch(f"{path} holds no list of gates under 'module'", hint=AGAIN)
    flat = {f"{index}.{name}": value for index, layer in enumerate(layers) for name, value in layer.items()}
    tensors = named_tensors(flat, path)
    return GateFiles(gate=fastkvzip_gate(path, id=id), tensors=tensors, hidden_act="none", warnings=())


def _numpy_classes() -> list[Any]:
    """Return what numpy's arrays and numbers are pickled as, under the names of numpy 1 and 2; none of it runs code."""
    import numpy as np
    from numpy._core import multiarray

    places = ("numpy.core.multiarray", "numpy._core.multiarray")
    made_by = [multiarray._reconstruct, multiarray.scalar]
    named = [(function, f"{place}.{function.__name__}") for place in places for function in made_by]
    return [*named, np.ndarray, np.dtype, *(type(np.dtype(code)) for code in "?bhilqBHILQefdO")]


def weights_file(folder: Path) -> Path:
    """Return the file of tensors in a gate folder, or the file that is one itself; raises as `read_gates` does."""
    if is_kvzap(folder) and not (folder / OWN_WEIGHTS).is_file():
        return folder / KVZAP_WEIGHTS
    return fastkvzip_file(folder) or gate_files(folder)[1]


def gate_files(folder: Path) -> tuple[Path, Path]:
    """Return the config and the weights of a gate folder; our own format wins where both lie.

    Raises:
        ModelNotFound: a file of the pair is missing, or both.
    """
    if not folder.is_dir():
        raise ModelNotFound(f"{folder} is no gate folder", hint=_FORMATS)
    pairs = [(folder / OWN_CONFIG, folder / OWN_WEIGHTS), (folder / RELEASED_CONFIG, folder / RELEASED_WEIGHTS)]
    for config, weights in pairs:
        if config.is_file() and weights.is_file():
            return config, weights
    for config, weights in pairs:
        if weights.is_file() or (config.name == OWN_CONFIG and config.is_file()):
            missing = config if weights.is_file() else weights
            raise ModelNotFound(f"{folder} lacks {missing.name}", hint=AGAIN)
    raise ModelNotFound(
        f"{folder} holds no gates",
        hint=_FORMATS,
    )


def _describe(config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, where: Path, id: str) -> GateSpec:
    context = config.get("trained_context" if where.name == OWN_CONFIG else "max_seq_len")
    known = {
        **config,
        "retention_gate": _variant(config.get("retention_gate") or _derived_variant(tensors), id=id),
        "retention_gate_intermediate_size": config.get("retention_gate_intermediate_size") or _derived_hidden(tensors),
        "max_seq_len": _count(context),
        "buffer_size": _count(config.get("buffer_size")),
        "base_model": _text(config.get("base_model")),
        "model_type": _text(config.get("model_type")),
    }
    return GateSpec.from_config(known, id=id)


def _warnings(config: Mapping[str, Any], gate: GateSpec, where: Path) -> Iterator[Notice]:
    if not config.get("retention_gate"):
        message = f"{where} names no gate variant; the tensors are those of {gate.variant}"
        yield Notice(code="gate_variant", message=message)


def _variant(said: object, *, id: str) -> str:
    if isinstance(said, str) and said in TRAINED_VARIANTS:
        return said
    raise GateMismatch(
        f"{id}: gate variant {said!r} is not supported", hint=f"trimkv runs {', '.join(TRAINED_VARIANTS)} gates"
    )


def _derived_variant(tensors: Mapping[str, Tensor]) -> str:
    names = {key.rpartition("retention_gate.")[2] for key in tensors}
    if "gate_proj.weight" in names:
        return "rg3"
    return "rg10" if "linear3.weight" in names else "rg"


def _derived_hidden(tensors: Mapping[str, Tensor]) -> int | None:
    return _width(tensors, FIRST_LAYER, axis=0)


def _count(value: object) -> int | None:
    """Return a whole number ≥ 1 of a field that is only reported, else None."""
    return int(value) if isinstance(value, int | float) and value >= 1 and value % 1 == 0 else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _config(gate: GateSpec, tensors: Mapping[str, Tensor], hidden_act: str) -> dict[str, Any]:
    return {
        "model_type": gate.model_type,
        "base_model": gate.base_model,
        "retention_gate": gate.variant,
        "retention_gate_intermediate_size": gate.hidden,
        "hidden_act": hidden_act,
        "memory_size": gate.memory_size,
        **({"largest_memory_size": gate.largest_memory_size} if gate.largest_memory_size else {}),
        "buffer_size": gate.buffer_size,
        **({} if gate.reads_kv else {"hidden_size": _width(tensors, FIRST_LAYER, axis=1)}),
        "num_hidden_layers": sum(key.endswith("retention_gate.bias") for key in tensors),
        "num_key_value_heads": _width(tensors, BIAS, axis=0),
    }


def _write(path: Path, write: Callable[[Path], object]) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(path) as partial:
            write(partial)
    except RuntimeError as error:  # torch's own writer, which does not say what the system said
        hint = "is the disk full?"
        raise TrimkvError(f"cannot write {path}: {one_line(error)}", hint=hint) from None


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_gates(
    spec: ModelSpec, gate: GateSpec, tensors: Mapping[str, Tensor], *, model_id: str | None = None
) -> tuple[Notice, ...]:
    """Check that the gates fit the model; return what is odd but usable.

    Raises:
        GateMismatch: another `model_type` or shape, or tensors that are missing, extra, misshapen or not finite; all
            are named.
    """
    check_fit(gate, spec, model_id=model_id or "")
    if not gate.trained:
        return ()
    expected = shapes_of_others(gate, spec, tensors) if gate.by_others else _expected(spec, gate)
    faults = list(_shape_faults(expected, tensors))
    if faults:
        raise GateMismatch(f"{gate.id} does not fit the model: {listed(faults)}", hint=HINT)
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise GateMismatch(f"{gate.id} holds NaN or infinite values: {listed(broken)}", hint="get the gates again")
    return tuple(_base_warning(gate, model_id))


def _expected(spec: ModelSpec, gate: GateSpec) -> dict[str, tuple[int, ...]]:
    shapes = layer_shapes(
        variant=gate.variant, input_size=gate.input_size(spec), hidden=gate.hidden, num_kv_heads=spec.num_kv_heads
    )
    return {tensor_key(layer, name): shape for layer in spec.kv_layers for name, shape in shapes.items()}


def _shape_faults(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> Iterator[str]:
    for key, shape in expected.items():
        tensor = tensors.get(key)
        if tensor is None:
            yield f"{key} is missing"
        elif tuple(tensor.shape) != shape:
            yield f"{key} is {list(tensor.shape)} instead of {list(shape)}"
        elif tensor.dtype not in FLOATS or tensor.layout != torch.strided:
            yield f"{key} is not a dense float tensor"
    yield from (f"{key} is not expected" for key in tensors if key not in expected)


def _base_warning(gate: GateSpec, model_id: str | None) -> Iterator[Notice]:
    if not model_id or not gate.base_model or (gate.by_others and named_after(model_id, gate.base_model)):
        return
    if _model_name(model_id) != _model_name(gate.base_model):
        yield Notice(code="gate_base_model", message=f"{gate.id} was trained for {gate.base_model}, not for {model_id}")


def _model_name(model_id: str) -> str:
    """Return what a hub id and a folder of the same model have in common: the last part, in small letters."""
    return re.split(r"[/\\]", model_id.rstrip("/\\"))[-1].lower()


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
    input_size: int | None  # the numbers by which a token is scored
    hidden_size: int | None  # the model's, where those are its hidden states
    num_kv_heads: int | None
    dtypes: tuple[str, ...]
    file: Path
    file_bytes: int
    sha256: str
    warnings: tuple[Notice, ...]


def gate_facts(folder: Path, *, id: str) -> GateFacts:
    """Read a gate folder and measure what is in it; raises as `read_gates` does."""
    gate, tensors, hidden_act, warnings = read_gates(folder, id=id)
    file = weights_file(folder)
    input_size = _width(tensors, FIRST_LAYER, axis=1)
    return GateFacts(
        gate=gate,
        hidden_act=hidden_act,
        layers=tuple(_biases(tensors)),
        input_size=input_size,
        hidden_size=None if gate.reads_kv else input_size,
        num_kv_heads=_width(tensors, BIAS, axis=0),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})),
        file=file,
        file_bytes=file.stat().st_size,
        sha256=_sha256(file),
        warnings=warnings,
    )


def _biases(tensors: Mapping[str, Tensor]) -> Iterator[LayerBias]:
    found = [(re.search(r"\d+", key), tensor) for key, tensor in tensors.items() if re.search(f"(?:{BIAS})$", key)]
    biases = [(int(match[0]), tensor) for match, tensor in found if match and tensor.numel()]
    for layer, bias in sorted(biases, key=itemgetter(0)):
        yield LayerBias(layer=layer, lowest=bias.float().min().item(), highest=bias.float().max().item())


def _width(tensors: Mapping[str, Tensor], name: str, *, axis: int) -> int | None:
    shapes = (tensor.shape for key, tensor in tensors.items() if re.search(f"(?:{name})$", key))
    return next((shape[axis] for shape in shapes if len(shape) > axis), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
