"""Whether gates fit a model: every tensor there, of the right shape, finite."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from trimkv_cli.cache.gates import TRAINED_VARIANTS, layer_shapes, tensor_key
from trimkv_cli.errors import GateMismatch
from trimkv_cli.plan import Warning
from trimkv_cli.spec import GateSpec, ModelSpec

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MOST_NAMED = 8


def check_gates(
    spec: ModelSpec, gate: GateSpec, tensors: Mapping[str, Tensor], *, model_id: str | None = None
) -> tuple[Warning, ...]:
    """Check that the gates fit the model; return what is odd but usable.

    Raises:
        GateMismatch: another `model_type`, or tensors that are missing, extra, misshapen or not finite; all are named.
    """
    hint = "use the gates made for this model, or --gates streaming"
    if gate.model_type is not None and gate.model_type != spec.model_type:
        raise GateMismatch(f"{gate.id} holds gates for {gate.model_type}, the model is {spec.model_type}", hint=hint)
    if gate.variant not in TRAINED_VARIANTS:
        return ()
    faults = list(_shape_faults(_expected(spec, gate), tensors))
    if faults:
        raise GateMismatch(f"{gate.id} does not fit the model: {listed(faults)}", hint=hint)
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise GateMismatch(f"{gate.id} holds NaN or infinite values: {listed(broken)}", hint="get the gates again")
    return tuple(_base_warning(gate, model_id))


def listed(names: Sequence[str]) -> str:
    """Join the first names, and count the others."""
    more = f", +{len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _expected(spec: ModelSpec, gate: GateSpec) -> dict[str, tuple[int, ...]]:
    shapes = layer_shapes(
        variant=gate.variant, hidden_size=spec.hidden_size, hidden=gate.hidden, num_kv_heads=spec.num_kv_heads
    )
    return {tensor_key(layer, name): shape for layer in range(spec.num_layers) for name, shape in shapes.items()}


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


def _base_warning(gate: GateSpec, model_id: str | None) -> Iterator[Warning]:
    if model_id and gate.base_model and _model_name(model_id) != _model_name(gate.base_model):
        yield Warning(
            code="gate_base_model", message=f"{gate.id} was trained for {gate.base_model}, not for {model_id}"
        )


def _model_name(model_id: str) -> str:
    """Return what a hub id and a folder of the same model have in common: the last part, in small letters."""
    return re.split(r"[/\\]", model_id.rstrip("/\\"))[-1].lower()
