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
    """Score one token per row in every layer: what gates read `[L, B, input]` → log_beta `[L, B, Hkv]`, float32.

    Gates that are neither constant nor of two linear layers are called one after the other, or, where operations cost
    more than what they compute, `at_once`.
    """

    def __init__(self, gates: Sequence[nn.Module], undo: ExitStack, *, at_once: bool = False) -> None:
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
        alike = len({type(gate) for gate in gates}) == 1 and not (self._constant or self._stacked)
        self._states = self._all_states(undo) if at_once and alike else None

    def __call__(self, hidden: Tensor, position: Tensor) -> Tensor:
        if self._constant:
            same: Tensor = self._gates[0](hidden[0][:, None], position[:, None])[:, 0]
            return same.expand(len(hidden), -1, -1)
        if self._states is not None:
            return self._at_once(self._states, hidden, position)
        if not self._stacked:
            each = zip(self._gates, hidden, strict=True)
            return torch.stack([gate(states[:, None], position[:, None])[:, 0] for gate, states in each])
        inner = self._activation(_products(hidden, self._weight1) + self._bias1)
        logits = _products(inner, self._weight2).float() + self._bias
        return -functional.softplus(-logits)

    def _at_once(self, all_states: dict[str, Tensor], hidden: Tensor, position: Tensor) -> Tensor:
        """Call one gate with the tensors of all as another dimension of every operation."""

        def call(states: dict[str, Tensor], read: Tensor) -> Tensor:
            scored: Tensor = torch.func.functional_call(self._gates[0], states, (read[:, None], position[:, None]))
            return scored[:, 0]

        log_beta: Tensor = torch.func.vmap(call)(all_states, hidden)
        return log_beta

    def _all_states(self, undo: ExitStack) -> dict[str, Tensor]:
        """Return each parameter and buffer of all gates as one tensor `[L, …]`, of which their own are parts."""
        named = [{**dict(gate.named_parameters()), **dict(gate.named_buffers())} for gate in self._gates]
        return {name: _stacked([own[name] for own in named], undo) for name in named[0]}

    def _stack(self, layer: str, name: str, undo: ExitStack) -> Tensor:
        """Return one tensor `[L, …]`, of which each gate's own is a part until `undo`."""
        return _stacked([getattr(getattr(gate, layer), name) for gate in self._gates], undo)


def _stacked(own: list[Tensor], undo: ExitStack) -> Tensor:
    """Return one tensor `[L, …]`, of which each of those given is a part until `undo`."""
    together = torch.stack([tensor.detach() for tensor in own])
    make_parts(own, together, undo)
    return together


def _products(x: Tensor, weights: Tensor) -> Tensor:
    """Multiply `[L, B, K]` by `[L, N, K]`, layer by layer."""
    if x.shape[1] == 1:  # the wide side first: a batch of one vector each is what MKL is fast at
        return torch.bmm(weights, x.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(x, weights.transpose(1, 2))
