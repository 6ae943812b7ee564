"""The cache policies that are compared: each is a gate, over the same model, cache and engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import torch
from torch import Tensor, nn

from trimkv_cli.cache.gates import RetentionGate, build_gates
from trimkv_cli.engine.loader import Parts
from trimkv_cli.eval.results import Policy
from trimkv_cli.spec import GateSpec, full_gate, streaming_gate


class RandomGate(RetentionGate):
    """Value each position by chance, each layer and head in its own way: log_beta uniform in (−1, 0).

    Scores age as they do under every gate: the latest tokens stay for sure, of the older ones a random choice.
    """

    def __init__(self, *, num_kv_heads: int, positions: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Buffer(-torch.rand(positions, num_kv_heads, generator=generator))

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        return self.table[positions.clamp(min=0).long()]


def gate_spec(policy: Policy, trained: GateSpec) -> GateSpec:
    """Describe a policy's gate as the plan wants it."""
    match policy:
        case "full":
            return full_gate()
        case "gates":
            return trained
        case "streaming":
            return streaming_gate()
        case "random":
            return GateSpec(variant="streaming", id="random", sinks=0)  # a constant gate: it has no weights
        case _:
            assert_never(policy)


def policy_gates(policy: Policy, parts: Parts, *, positions: int, seed: int) -> Sequence[nn.Module]:
    """Return one gate per layer, for sequences of at most `positions` tokens."""
    spec, device = parts.facts.spec, parts.model.device
    if policy == "gates":
        return parts.gates
    if policy == "random":
        return [
            RandomGate(num_kv_heads=spec.num_kv_heads, positions=positions, seed=seed * spec.num_layers + layer).to(
                device
            )
            for layer in range(spec.num_layers)
        ]
    return list(build_gates(gate_spec(policy, parts.facts.gate), spec, {}, dtype=torch.float32, device=device))
