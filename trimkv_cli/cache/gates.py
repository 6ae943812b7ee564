"""Retention gates: from the hidden states that enter attention to the log of how well each token lasts.

A gate is one module per decoder layer. Trained gates are small MLPs; streaming and full cache are constant ones, so
that every cache policy is a gate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimkv_cli.errors import GateMismatch
from trimkv_cli.model.spec import GateSpec, ModelSpec

TRAINED_VARIANTS = ("rg", "rg10")


class RetentionGate(nn.Module):
    """Score tokens for one layer; subclasses say how."""

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
        """Return `log_beta` `[B, T, Hkv]`, float32, ≤ 0.

        `hidden_states` `[B, T, hidden]` enter `self_attn` (after its layer norm, before QKV); `positions` `[B, T]`
        count from 0. Where a position is −1 (padding) the result has no meaning.
        """
        raise NotImplementedError


class MlpGate(RetentionGate):
    """Score with a trained MLP (rg: arXiv 2512.03324, two linear layers; rg10: arXiv 2605.09649, three).

    The linear layers run in the dtype that they are kept in, the model's compute dtype; `bias` and logsigmoid are
    float32. The last linear layer has no bias of its own.
    """

    def __init__(
        self, *, variant: str, hidden_size: int, hidden: int, num_kv_heads: int, activation: nn.Module
    ) -> None:
        super().__init__()
        deep = variant == "rg10"
        self.activation = activation
        self.linear1 = nn.Linear(hidden_size, hidden)
        self.linear2 = nn.Linear(hidden, hidden) if deep else nn.Linear(hidden, num_kv_heads, bias=False)
        self.linear3 = nn.Linear(hidden, num_kv_heads, bias=False) if deep else None
        self.bias = nn.Parameter(torch.zeros(num_kv_heads, dtype=torch.float32))

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        logits = self.linear2(self.activation(self.linear1(hidden_states)))
        if self.linear3 is not None:
            logits = self.linear3(self.activation(logits))
        # logsigmoid; torch's own function of that name wakes all threads for a handful of numbers
        return -functional.softplus(-(logits.float() + self.bias))


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


def layer_shapes(*, variant: str, hidden_size: int, hidden: int, num_kv_heads: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of one trained gate by its name within the layer."""
    first = {"linear1.weight": (hidden, hidden_size), "linear1.bias": (hidden,)}
    if variant == "rg":
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
        return nn.ModuleList(StreamingGate(num_kv_heads=heads, sinks=sinks) for _ in range(spec.num_layers))
    if gate.variant == "none":
        return nn.ModuleList(FullGate(num_kv_heads=spec.num_kv_heads) for _ in range(spec.num_layers))
    return nn.ModuleList(
        _load(_empty_gate(gate, spec, hidden_act), layer, tensors, dtype, device) for layer in range(spec.num_layers)
    )


def _empty_gate(gate: GateSpec, spec: ModelSpec, hidden_act: str) -> MlpGate:
    with torch.device("meta"):
        return MlpGate(
            variant=gate.variant,
            hidden_size=spec.hidden_size,
            hidden=gate.hidden,
            num_kv_heads=spec.num_kv_heads,
            activation=_activation(hidden_act),
        )


def _load(
    gate: MlpGate, layer: int, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> MlpGate:
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
