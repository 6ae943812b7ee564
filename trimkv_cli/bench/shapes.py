"""Networks to measure: a model with its gates, or one of a model's size with random weights and without a download."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trimkv_cli.cache.gates import build_gates, layer_shapes, tensor_key
from trimkv_cli.engine.devices import take_device
from trimkv_cli.errors import UsageError
from trimkv_cli.loading.device_warnings import device_warnings
from trimkv_cli.loading.loader import TORCH_DTYPES, load_parts
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.packed import pack_in_place
from trimkv_cli.loading.sources import Source
from trimkv_cli.model.machine import Machine
from trimkv_cli.model.profiles import list_profiles
from trimkv_cli.model.spec import Dtype, GateSpec, ModelSpec, Quantisation
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.plan.plan import make_plan

_TEN_MILLION: Mapping[str, Any] = {
    "model_type": "qwen3",
    "dtype": "float32",
    "vocab_size": 2048,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
_GATE_BIAS = 6.0  # log_beta about −0.0025: a token lasts for some hundreds of steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The form of a network: what config.json says, and what its gates are."""

    name: str
    config: Mapping[str, Any]
    gate: GateSpec

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec.from_config(self.config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A loaded model and its gates."""

    name: str
    spec: ModelSpec
    gate: GateSpec
    model: PreTrainedModel
    gates: Sequence[nn.Module]
    dtype: Dtype
    quantize: Quantisation = "none"
    warnings: tuple[str, ...] = ()

    @property
    def device_name(self) -> str:
        """Name the hardware: the GPU, or the processor's architecture."""
        device = self.model.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def find_shape(name: str) -> Shape:
    """Return the shape called `name`: `10m`, a profile, or the part of a profile's name that says the model's size.

    Raises:
        UsageError: there is none of that name.
    """
    if name == "10m":
        gate = GateSpec(variant="rg", id="random", hidden=512, memory_size=None)
        return Shape(name=name, config=_TEN_MILLION, gate=gate)
    shapes = {profile.name: profile for profile in list_profiles() if profile.config}
    chosen = shapes.get(name) or next((shapes[known] for known in sorted(shapes) if known.startswith(f"{name}-")), None)
    if chosen is None:
        raise UsageError(f"there is no shape {name!r}", hint=f"--shape 10m, or one of {', '.join(sorted(shapes))}")
    gate = GateSpec(variant="rg", id="random", hidden=chosen.gate_hidden, memory_size=chosen.trained_kv_budget)
    return Shape(name=name, config=chosen.config, gate=gate)


def random_network(shape: Shape, options: EngineOptions) -> Network:
    """Build the network with random weights and gates, the same on every call."""
    device = take_device(options.device)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    spec = shape.spec
    chosen = PlanOptions(kv_budget=1, dtype=options.dtype, quantize=_form(options), device=device.type)
    run = make_plan(spec, shape.gate, chosen).run
    dtype, quantize = run.dtype, run.quantize
    torch.manual_seed(0)
    values = {key: value for key, value in shape.config.items() if key not in ("model_type", "dtype")}
    config = AutoConfig.for_model(shape.config["model_type"], **values)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPES[dtype])
    tensors = _random_gates(spec, shape.gate)
    gates = build_gates(shape.gate, spec, tensors, dtype=TORCH_DTYPES[dtype], device=device)
    loaded = model.eval().requires_grad_(requires_grad=False)
    if quantize in ("int4", "int8"):
        pack_in_place(loaded, quantize, Machine.here())
    return Network(
        name=shape.name,
        spec=spec,
        gate=shape.gate,
        model=loaded,
        gates=tuple(gates),
        dtype=dtype,
        quantize=quantize,
        warnings=tuple(warning.message for warning in device_warnings(options.device, device)),
    )


def _form(options: EngineOptions) -> str:
    """Return how random weights are held: as they are unless a packed form is asked for.

    Raises:
        UsageError: another form.
    """
    if options.quantize in ("auto", "none"):
        return "none"
    if options.quantize not in ("int4", "int8") or options.device not in ("auto", "cpu"):
        raise UsageError(
            f"random weights are not held as {options.quantize}", hint="--quantize int4 or int8 on a CPU, or none"
        )
    return options.quantize


def load_network(source: Source, options: EngineOptions) -> Network:
    """Load a model that was found and its gates as every command does; raises as `load_parts` does."""
    parts = load_parts(source, options)
    facts = parts.facts
    return Network(
        name=facts.model_id,
        spec=facts.spec,
        gate=facts.gate,
        model=parts.model,
        gates=parts.gates,
        dtype=facts.plan.run.dtype,
        quantize=facts.plan.run.quantize,
        warnings=tuple(warning.message for warning in facts.warnings),
    )


def _random_gates(spec: ModelSpec, gate: GateSpec) -> dict[str, Tensor]:
    shapes = layer_shapes(
        variant=gate.variant, input_size=spec.hidden_size, hidden=gate.hidden, num_kv_heads=spec.num_kv_heads
    )
    return {
        tensor_key(layer, name): torch.full(shape, _GATE_BIAS) if name == "bias" else torch.randn(shape) * 0.02
        for layer in spec.kv_layers
        for name, shape in shapes.items()
    }
