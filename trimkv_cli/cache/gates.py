"""Retention gates: from what a layer sees of each token to the log of how well it lasts.

Most read the hidden states that enter attention, rg2 and rg3 a token's keys and values. A gate is one module per
decoder layer. Trained gates are small MLPs, or what others made; streaming, KeyDiff and full cache are constant ones,
so that every cache policy is a gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimkv_cli.cache.other_gates import build_others
from trimkv_cli.cache.retention_gate import RetentionGate
from trimkv_cli.errors import GateMismatch
from trimkv_cli.model.spec import GateSpec, ModelSpec


class MlpGate(RetentionGate):
    """Score with a trained MLP (rg: arXiv 2512.03324, two linear layers; rg10: arXiv 2605.09649, three).

    rg2 is an rg that reads keys and values. The linear layers run in the dtype that they are kept in, the model's
    compute dtype; `bias` and logsigmoid are float32. The last linear layer has no bias of its own.
    """

    def __init__(self, *, variant: str, input_size: int, hidden: int, num_kv_heads: int, activation: nn.Module) -> None:
        super().__init__()
        self.reads_kv = variant == "rg2"
        deep = variant == "rg10"
        self.activation = activation
        self.linear1 = nn.Linear(input_size, hidden)
        self.linear2 = nn.Linear(hidden, hidden) if deep else nn.Linear(hidden, num_kv_heads, bias=False)
        self.linear3 = nn.Linear(hidden, num_kv_heads, bias=False) if deep else None
        self.bias = nn.Parameter(torch.zeros(num_kv_heads, dtype=torch.float32))

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        logits = self.linear2(self.activation(self.linear1(hidden_states)))
        if self.linear3 is not None:
            logits = self.linear3(self.activation(logits))
        return _log_sigmoid(logits.float() + self.bias)


class SwigluGate(RetentionGate):
    """Score keys and values with a trained SwiGLU (rg3), in the dtypes of `MlpGate`."""

    reads_kv = True

    def __init__(self, *, input_size: int, hidden: int, num_kv_heads: int, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(input_size, hidden, bias=False)
        self.up_proj = nn.Linear(input_size, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, num_kv_heads, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_kv_heads, dtype=torch.float32))

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        inner = self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return _log_sigmoid(self.down_proj(inner).float() + self.bias)


def _log_sigmoid(logits: Tensor) -> Tensor:
    """Return what torch's own function of that name does, which wakes all threads for a handful of numbers."""
    return -functional.softplus(-logits)


def kv_states(key: Tensor, value: Tensor) -> Tensor:
    """Join the rotated keys of all heads and their values `[B, Hkv, T, D]` → `[B, T, 2 · Hkv · D]`."""
    return torch.cat([states.transpose(1, 2).flatten(2) for states in (key, value)], dim=-1)


class StreamingGate(RetentionGate):
    """Keep the first `sinks` tokens for good and the newest of the others: attention sinks and a sliding window."""

    def __init__(self, *, num_kv_heads: int, sinks: int = 4) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.sinks = sinks

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        log_beta = (positions < self.sinks).float() - 1.0
        return log_beta[..., None].repeat(1, 1, self.num_kv_heads)


class FullGate(RetentionGate):
    """Value every token alike: for a cache that never has to evict."""

    def __init__(self, *, num_kv_heads: int) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        return torch.zeros(*positions.shape, self.num_kv_heads, dtype=torch.float32, device=positions.device)


class KeydiffGate(RetentionGate):
    """Keep the first `sinks` tokens for good; what the others are worth is found from all keys before each eviction."""

    def __init__(self, *, num_kv_heads: int, sinks: int = 4) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.sinks = sinks

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        kept = torch.zeros(positions.shape, device=positions.device).masked_fill(positions < self.sinks, torch.inf)
        return kept[..., None].repeat(1, 1, self.num_kv_heads)


def layer_shapes(*, variant: str, input_size: int, hidden: int, num_kv_heads: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of one trained gate by its name within the layer."""
    if variant == "rg3":
        wide = {"gate_proj.weight": (hidden, input_size), "up_proj.weight": (hidden, input_size)}
        return {**wide, "down_proj.weight": (num_kv_heads, hidden), "bias": (num_kv_heads,)}
    first = {"linear1.weight": (hidden, input_size), "linear1.bias": (hidden,)}
    if variant != "rg10":
        return {**first, "linear2.weight": (num_kv_heads, hidden), "bias": (num_kv_heads,)}
    second = {"linear2.weight": (hidden, hidden), "linear2.bias": (hidden,)}
    return {**first, **second, "linear3.weight": (num_kv_heads, hidden), "bias": (num_kv_heads,)}


def activation_name(config: Mapping[str, object]) -> str:
    """Return the activation that a model's config names, as most families or as Gemma do; SiLU where it names none."""
    named = (config.get(key) for key in ("hidden_act", "hidden_activation"))
    return next((name for name in named if isinstance(name, str) and name), "silu")


def tensor_key(layer: int, name: str) -> str:
    """Return the name that a gate tensor has in a file."""
    return f"model.layers.{layer}.self_attn.retention_gate.{name}"


def build_gates(
    gate: GateSpec,
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    hidden_act: str = "silu",
) -> nn.ModuleList:
    """Return one gate per layer of the model, its linear layers in `dtype`; constant gates need no tensors.

    The tensors are taken as `check_gates` has passed them.
    """
    if gate.variant == "streaming":
        heads, sinks = spec.num_kv_heads, gate.sinks
        return nn.ModuleList(StreamingGate(num_kv_heads=heads, sinks=sinks) for _ in range(spec.num_kv_layers))
    if gate.variant == "keydiff":
        heads, sinks = spec.num_kv_heads, gate.sinks
        return nn.ModuleList(KeydiffGate(num_kv_heads=heads, sinks=sinks) for _ in range(spec.num_kv_layers))
    if gate.variant == "none":
        return nn.ModuleList(FullGate(num_kv_heads=spec.num_kv_heads) for _ in range(spec.num_kv_layers))
    if gate.by_others:
        return nn.ModuleList(build_others(gate, spec, tensors, dtype=dtype, device=device))
    return nn.ModuleList(
        _load(_empty_gate(gate, spec, hidden_act), layer, tensors, dtype, device) for layer in spec.kv_layers
    )


def _empty_gate(gate: GateSpec, spec: ModelSpec, hidden_act: str) -> RetentionGate:
    shape: dict[str, Any] = {
        "input_size": gate.input_size(spec),
        "hidden": gate.hidden,
        "num_kv_heads": spec.num_kv_heads,
        "activation": _activation(hidden_act),
    }
    with torch.device("meta"):
        return SwigluGate(**shape) if gate.variant == "rg3" else MlpGate(variant=gate.variant, **shape)


def _load(
    gate: RetentionGate, layer: int, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> RetentionGate:
    kept_in = {name: torch.float32 if name == "bias" else dtype for name in gate.state_dict()}
    own = {name: tensors[tensor_key(layer, name)].to(device=device, dtype=kept) for name, kept in kept_in.items()}
    gate.load_state_dict(own, assign=True)
    return gate.requires_grad_(requires_grad=False)


def _activation(name: str) -> nn.Module:
    """Return the activation that transformers calls `name`.

    Raises:
        GateMismatch: transformers knows none of this name.
    """
    from transformers.activations import ACT2FN

    try:
        module: nn.Module = ACT2FN[name]
    except KeyError:
        raise GateMismatch(
            f"the gates use an unknown activation: {name!r}", hint="they need hidden_act = silu"
        ) from None
    return module
