"""Stream 100,000 tokens through a bounded cache, and record that bytes, memory and time per token stay flat.

python -m bench.stream --out kernels/bench/results/stream-cpu.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from bench.record import write_record
from trimkv_cli.cache.gates import build_gates, layer_shapes, tensor_key
from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.facts import EngineFacts
from trimkv_cli.loading.assemble import assemble
from trimkv_cli.model.spec import GateSpec, ModelSpec
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.plan.plan import make_plan
from trimkv_cli.request import Request, SamplingParams

_GATE_HIDDEN = 32


def make_engine(*, kv_budget: int, positions: int) -> Engine:
    """Build a tiny random model with random gates, one row, in float32."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=positions,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    spec = ModelSpec.from_config(config.to_dict())
    gate = GateSpec(variant="rg", id="random", hidden=_GATE_HIDDEN, memory_size=kv_budget)
    gates = build_gates(gate, spec, _random_gates(spec), dtype=torch.float32, device="cpu")
    plan = make_plan(spec, gate, PlanOptions(kv_budget=kv_budget, max_inflight=1))
    facts = EngineFacts.of(model, gates, plan=plan, model_id="random")
    return assemble(model, list(gates), facts, text=None, kv_dtype=torch.float32)


def _random_gates(spec: ModelSpec) -> dict[str, torch.Tensor]:
    shapes = layer_shapes(
        variant="rg", input_size=spec.hidden_size, hidden=_GATE_HIDDEN, num_kv_heads=spec.num_kv_heads
    )
    return {
        tensor_key(layer, name): torch.full(shape, 4.0) if name == "bias" else torch.randn(shape) * 0.3
        for layer in spec.kv_layers
        for name, shape in shapes.items()
    }


def measure(engine: Engine, tokens: int) -> Iterator[tuple[float, int, int]]:
    """Yield each step's seconds, resident bytes of the process (read every 1,000 steps) and bytes of the cache."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0)
    engine.add(Request(id="stream", prompt_token_ids=(1, 2, 3), params=params))
    process = psutil.Process()
    rss = process.memory_info().rss
    for step in range(tokens):
        if not engine.has_work:
            return
        started = time.perf_counter()
        engine.step()
        elapsed = time.perf_counter() - started
        rss = process.memory_info().rss if step % 1000 == 0 else rss
        yield elapsed, rss, engine.kv_bytes


def summarise(samples: list[tuple[float, int, int]]) -> dict[str, Any]:
    """Compare the first and the last tenth of the stream."""
    tenth = len(samples) // 10
    seconds, rss, kv_bytes = zip(*samples, strict=True)
    first, last = median(seconds[:tenth]), median(seconds[-tenth:])
    warm = rss[tenth:]
    return {
        "steps": len(samples),
        "ms_per_token_first_tenth_p50": first * 1e3,
        "ms_per_token_last_tenth_p50": last * 1e3,
        "last_over_first": last / first,
        "rss_bytes_after_warm_up": warm[0],
        "rss_bytes_growth": max(warm) - warm[0],
        "kv_bytes_min": min(kv_bytes),
        "kv_bytes_max": max(kv_bytes),
    }


def main() -> None:
    """Run the stream and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--kv-budget", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    engine = make_engine(kv_budget=arguments.kv_budget, positions=131_072)
    measured = {"kv_budget": arguments.kv_budget, **summarise(list(measure(engine, arguments.tokens)))}
    write_record("bench.stream", measured, arguments.out)


if __name__ == "__main__":
    main()
