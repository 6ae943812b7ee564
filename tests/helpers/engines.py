"""Engines around tiny models, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from trimkv_cli.cache import retention_cache
from trimkv_cli.cache.gates import build_gates, layer_shapes, tensor_key
from trimkv_cli.engine import cuda
from trimkv_cli.engine import sampler as sampling
from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.facts import EngineFacts
from trimkv_cli.engine.sampler import Sampler
from trimkv_cli.loading import assemble as assembling
from trimkv_cli.loading.assemble import assemble
from trimkv_cli.model.pins import Pins
from trimkv_cli.model.spec import TRAINED_VARIANTS, GateSpec, ModelSpec, full_gate, keydiff_gate, streaming_gate
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.plan.plan import Plan, make_plan
from trimkv_cli.request import Request, SamplingParams
from trimkv_kernels import StepOperations, step_reference

NO_PINS = Pins()
# What makes a tiny Phi-3 rotate with other factors from the 65th token on.
LONG_ROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        "original_max_position_embeddings": 64,
    },
    "original_max_position_embeddings": 64,
    "max_position_embeddings": 256,
}


class RandomGate(torch.nn.Module):
    """A gate with spread-out scores that differ by layer and head."""

    weight: torch.Tensor

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(layer)
        self.register_buffer("weight", torch.randn(spec.hidden_size, spec.num_kv_heads, generator=generator) * 0.5)

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.logsigmoid((hidden_states @ self.weight).float() + 2.0)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the tests vary."""

    kv_budget: int = 96
    rows: int = 4
    prefill_chunk: int = 512
    gate: str = "none"  # none, streaming, keydiff, random, or a variant of trained ones
    deterministic: bool = False
    eos: frozenset[int] = frozenset()
    rebases: bool = False


def make_plan_for(spec: ModelSpec, gate: GateSpec, shape: Shape, pins: Pins = NO_PINS) -> Plan:
    options = PlanOptions(
        kv_budget=shape.kv_budget,
        prefill_chunk=shape.prefill_chunk,
        max_inflight=shape.rows,
        rebases=shape.rebases,
        pins=pins,
    )
    return make_plan(spec, gate, options)


def make_engine(model: Any, shape: Shape, *, text: Any = None, pins: Pins = NO_PINS, fast_path: bool = True) -> Engine:
    spec = ModelSpec.from_config(model.config.to_dict())
    sinks = 0 if shape.gate == "random" else 4
    constant = {"none": full_gate(), "keydiff": keydiff_gate()}
    gate = constant.get(shape.gate, streaming_gate(sinks))
    tensors: dict[str, torch.Tensor] = {}
    if shape.gate in TRAINED_VARIANTS:
        gate = GateSpec(variant=TRAINED_VARIANTS[shape.gate], id="random", hidden=24)
        tensors = gate_tensors(gate, spec)
    gates: Sequence[Any] = build_gates(gate, spec, tensors, dtype=torch.float32, device=model.device)
    if shape.gate == "random":
        gates = [RandomGate(spec, layer).to(model.device) for layer in range(spec.num_kv_layers)]
    plan = make_plan_for(spec, gate, shape, pins)
    facts = EngineFacts.of(model, gates, plan=plan, model_id="tiny", eos_token_ids=shape.eos)
    how: dict[str, Any] = {"deterministic": shape.deterministic, "rebases": shape.rebases, "fast_path": fast_path}
    return assemble(model, list(gates), facts, text=text, kv_dtype=torch.float32, **how)


@contextmanager
def as_on_a_gpu(module: Any = step_reference) -> Iterator[None]:
    """Let engines on the CPU decode as on a GPU: fused, by the operations of a module, over layers that lie alone."""

    def make_decoder(*parts: Any, rows: int, **how: Any) -> cuda.Decoder:
        decoder = cuda.make_decoder(*parts, **how, operations=StepOperations.of(module))
        assert decoder is not None, "its form is not known"
        return decoder

    with (
        mock.patch.object(retention_cache, "_make_pools", return_value={}),
        mock.patch.object(assembling, "_make_decoder", make_decoder),
    ):
        yield


def gate_tensors(gate: GateSpec, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Draw the tensors of trained gates, with spread-out scores; the same arguments give the same ones."""
    generator = torch.Generator().manual_seed(2)
    shapes = layer_shapes(
        variant=gate.variant, input_size=gate.input_size(spec), hidden=gate.hidden, num_kv_heads=spec.num_kv_heads
    )
    return {
        tensor_key(layer, name): torch.randn(shape, generator=generator) * 0.3
        for layer in range(spec.num_layers)
        for name, shape in shapes.items()
    }


def run(engine: Engine, requests: Iterable[Request]) -> dict[str, list[int]]:
    """Run requests to their ends; return their output ids."""
    output: dict[str, list[int]] = {}
    for event in engine.generate(requests):
        output.setdefault(event.request_id, []).extend(event.token_ids)
    return output


def adjusted(sampler: Sampler, logits: torch.Tensor, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores `[B, V]` that penalties and biases leave, and what a sampler chooses."""
    with mock.patch.object(sampling, "_choose", wraps=sampling._choose) as choose:
        chosen = sampler(logits, rows)
    return torch.cat([call.args[0] for call in choose.call_args_list]), chosen


def greedy(identifier: str, ids: Sequence[int], count: int, **more: Any) -> Request:
    params = SamplingParams(max_tokens=count, temperature=0.0)
    return Request(id=identifier, prompt_token_ids=tuple(ids), params=params, **more)
