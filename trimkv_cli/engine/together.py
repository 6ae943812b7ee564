"""Weights of several modules as parts of one tensor, each until it lies alone again; and the gates of all layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimkv_cli.cache.gates import FullGate, KeydiffGate, MlpGate, StreamingGate
from trimkv_cli.cache.retention_gate import RetentionGate


def make_parts(parameters: Iterable[Tensor], parts: Iterable[Tensor], undo: ExitStack) -> None:
    """Let parameters lie where equal parts of one tensor do, and alone again after `undo`."""
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
        undo.callback(_lie_alone, parameter)


def _lie_alone(parameter: Tensor) -> None:
    parameter.data = parameter.data.clone()


def one_matrix(linears: Sequence[nn.Linear], undo: ExitStack) -> Tensor:
    """Return the weights as one matrix `[N, K]`, of which each layer's own is a part until `undo`."""
    weights = [linear.weight for linear in linears]
    if len(weights) == 1 and weights[0].is_contiguous():
        return weights[0].detach()
    matrix = torch.cat([weight.detach() for weight in weights])
    make_parts(weights, torch.split(matrix, [len(weight) for weight in weights]), undo)
    return matrix


def one_bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    """Return a copy of the biases as one `[N]`; None without."""
    biases: list[Tensor] = [linear.bias.detach() for linear in linears if "bias" in dict(linear.named_parameters())]
    return torch.cat(biases) if biases else None


class GatesTogether:
    """Score one token per row in every layer: what gates read `[L, B, input]` → log_beta `[L, B, Hkv]`, float32."""

    def __init__(self, gates: Sequence[nn.Module], undo: ExitStack) -> None:
        self._gates: list[Any] = list(gates)
        self.read_kv = any(isinstance(gate, RetentionGate) and gate.reads_kv for gate in gates)
        self._constant = all(isinstance(gate, StreamingGate | KeydiffGate | FullGate) for gate in gates)
        # Gates of two linear layers are stacked; the third of rg10 is one tensor for all layers and stays as it is.
        self._stacked = all(isinstance(gate, MlpGate) and gate.linear3 is None for gate in gates)
        if self._stacked:
            self._activation = self._gates[0].activation
            self._weight1 = self._stack("linear1", "weight", undo)
            self._bias1 = self._stack("linear1", "bias", undo)[:, None]
            self._weight2 = self._stack("linear2", "weight", undo)
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

    def _stack(self, layer: str, name: str, undo: ExitStack) -> Tensor:
        """Return one tensor `[L, …]`, of which each gate's own is a part until `undo`."""
        own = [getattr(getattr(gate, layer), name) for gate in self._gates]
        stacked = torch.stack([parameter.detach() for parameter in own])
        make_parts(own, stacked, undo)
        return stacked


def _products(x: Tensor, weights: Tensor) -> Tensor:
    """Multiply `[L, B, K]` by `[L, N, K]`, layer by layer."""
    if x.shape[1] == 1:  # the wide side first: a batch of one vector each is what MKL is fast at
        return torch.bmm(weights, x.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(x, weights.transpose(1, 2))
