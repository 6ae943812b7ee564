"""The gates of all layers evaluated together, where their form allows it: on a CPU fewer operations are faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimkv_cli.cache.gates import FullGate, MlpGate, StreamingGate


class GatesTogether:
    """Score one token per row in every layer: hidden states `[L, B, hidden]` → log_beta `[L, B, Hkv]`, float32."""

    def __init__(self, gates: Sequence[nn.Module]) -> None:
        self._gates: list[Any] = list(gates)
        self._constant = all(isinstance(gate, StreamingGate | FullGate) for gate in gates)
        # Gates of two linear layers are stacked; the third of rg10 is one tensor for all layers and stays as it is.
        self._stacked = all(isinstance(gate, MlpGate) and gate.linear3 is None for gate in gates)
        if self._stacked:
            self._activation = self._gates[0].activation
            self._weight1 = self._stack("linear1", "weight")
            self._bias1 = self._stack("linear1", "bias")[:, None]
            self._weight2 = self._stack("linear2", "weight")
            self._bias = torch.stack([gate.bias.detach() for gate in self._gates])[:, None]

    def __call__(self, hidden: Tensor, position: Tensor) -> Tensor:
        if self._constant:
            same: Tensor = self._gates[0](hidden[0][:, None], position[:, None])[:, 0]
            return same.expand(len(hidden), -1, -1)
        if not self._stacked:
            each = zip(self._gates, hidden, strict=True)
            return torch.stack([gate(states[:, None], position[:, None])[:, 0] for gate, states in each])
        inner = self._activation(_products(hidden, self._weight1) + self._bias1)
        logits = _products(inner, self._weight2).float() + self._bias
        return -functional.softplus(-logits)

    def _stack(self, layer: str, name: str) -> Tensor:
        """Return one tensor `[L, …]`, of which each gate's own is a part from then on."""
        stacked = torch.stack([getattr(getattr(gate, layer), name).detach() for gate in self._gates])
        for gate, part in zip(self._gates, stacked, strict=True):
            getattr(getattr(gate, layer), name).data = part
        return stacked


def _products(x: Tensor, weights: Tensor) -> Tensor:
    """Multiply `[L, B, K]` by `[L, N, K]`, layer by layer."""
    if torch.compiler.is_compiling() and x.shape[1] == 1 and x.device.type == "cpu":
        return (weights * x).sum(-1)[:, None]
    if x.shape[1] == 1:  # the wide side first: a batch of one vector each is what MKL is fast at
        return torch.bmm(weights, x.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(x, weights.transpose(1, 2))
