"""Gates before training, and gates as tensors with the names that files give them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimkv_cli.cache.gates import build_gates, layer_shapes, tensor_key
from trimkv_cli.spec import GateSpec, ModelSpec
from trimkv_cli.train.options import TrainOptions

INIT_STD = 0.02


def describe_gates(options: TrainOptions, spec: ModelSpec, model_id: str) -> GateSpec:
    """Describe the gates that a run makes."""
    return GateSpec(
        variant=options.gate,
        id=model_id,
        hidden=options.hidden,
        memory_size=options.memory_size,
        largest_memory_size=options.largest_memory_size,
        trained_context=options.context,
        base_model=model_id,
        model_type=spec.model_type,
    )


def new_gates(
    gate: GateSpec, spec: ModelSpec, options: TrainOptions, *, hidden_act: str, device: torch.device
) -> nn.ModuleList:
    """Return gates in float32 that can learn: weights N(0, 0.02), biases 0, and `bias` as the options say."""
    shapes = layer_shapes(
        variant=gate.variant, hidden_size=spec.hidden_size, hidden=gate.hidden, num_kv_heads=spec.num_kv_heads
    )
    generator = torch.Generator().manual_seed(options.seed)
    tensors = {
        tensor_key(layer, name): _initial(name, shape, options.bias_init, generator)
        for layer in range(spec.num_layers)
        for name, shape in shapes.items()
    }
    gates = build_gates(gate, spec, tensors, dtype=torch.float32, device=device, hidden_act=hidden_act)
    return gates.requires_grad_(requires_grad=True)


def gate_tensors(gates: nn.ModuleList) -> dict[str, Tensor]:
    """Return the parameters of all gates by their names in a file."""
    return {
        tensor_key(layer, name): parameter
        for layer, gate in enumerate(gates)
        for name, parameter in gate.named_parameters()
    }


def _initial(name: str, shape: tuple[int, ...], bias_init: float, generator: torch.Generator) -> Tensor:
    if name == "bias":
        return torch.full(shape, bias_init)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator) * INIT_STD
