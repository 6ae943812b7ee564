"""Compare what a plan says with what is allocated: weights, gates, cache and workspace, in each precision, on a CPU.

python -m bench.memory --out kernels/bench/results/memory-cpu.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from bench.live_bytes import LiveBytes
from bench.record import write_record
from trimkv_cli.cache.gates import layer_shapes, tensor_key
from trimkv_cli.engine.engine import Engine
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.model.spec import ModelSpec
from trimkv_cli.request import Request, SamplingParams

PRECISIONS = (("fp32", "none"), ("bf16", "none"), ("bf16", "int8"), ("bf16", "nf4"))
PACKED = (("fp32", "int8"), ("fp32", "int4"), ("bf16", "int4"))  # on a CPU, where int8 is packed as well
PLANNED = ("weights", "gates", "kv", "shared_prefix", "journal", "workspace", "logits", "dequantised", "unpacked")
_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
_M88 = {
    "vocab_size": 16000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
}
_M160 = {**_M88, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3, tiny": {"model_type": "qwen3", **_TINY},
    "qwen2, tiny": {"model_type": "qwen2", **_TINY},
    "llama, tiny": {"model_type": "llama", **_TINY},
    "mistral, tiny": {"model_type": "mistral", **_TINY, "sliding_window": 24},
    "phi3, tiny": {"model_type": "phi3", **_TINY, "pad_token_id": 0},
    "gemma3, tiny": {"model_type": "gemma3_text", **_TINY, "sliding_window": 24},
    "mixtral, tiny": {"model_type": "mixtral", **_TINY, "num_local_experts": 4},
    "qwen3_moe, tiny": {"model_type": "qwen3_moe", **_TINY, "num_experts": 8, "moe_intermediate_size": 96},
    "gpt_oss, tiny": {
        "model_type": "gpt_oss",
        **_TINY,
        "num_local_experts": 4,
        "sliding_window": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "qwen3, 88M": {"model_type": "qwen3", **_M88},
    "llama, 155M": {"model_type": "llama", **_M160},
}


def save_model(config: dict[str, Any], folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a random model with random gates beside it, in the released format; return its folder."""
    values = dict(config)
    made = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, dtype=dtype)
    model.save_pretrained(folder)
    spec = ModelSpec.from_config(made.to_dict())
    shapes = layer_shapes(variant="rg", input_size=spec.hidden_size, hidden=512, num_kv_heads=spec.num_kv_heads)
    tensors = {
        tensor_key(layer, name): torch.randn(shape).to(torch.bfloat16) * 0.1
        for layer in spec.kv_layers
        for name, shape in shapes.items()
    }
    gates = folder / "gates"
    gates.mkdir()
    torch.save(tensors, gates / "trimkv_weights.pth")
    said = {"retention_gate": "rg", "memory_size": 64, "model_type": spec.model_type}
    (gates / "config.json").write_text(json.dumps(said), encoding="utf-8")
    return folder


def measure(
    folder: Path, *, dtype: str, quantize: str, rows: int, kv_budget: int, chunk: int, threads: int = 1
) -> dict[str, Any]:
    """Read prompts longer than cache and chunk, sample with every filter on, and count what was allocated."""
    options = EngineOptions(
        model=str(folder),
        dtype=dtype,
        quantize=quantize,
        device="cpu",
        offline=True,
        max_inflight=rows,
        kv_budget=str(kv_budget),
        prefill_chunk=chunk,
        threads=threads,
    )
    engine = load_engine(options)
    with LiveBytes() as live:
        list(engine.generate(requests(rows + 1, 2 * chunk + kv_budget)))
    measured = engine.facts.weight_bytes + engine.facts.gate_bytes + cache_bytes(engine) + live.peak
    plan = engine.facts.plan
    planned = sum(plan.run.part_bytes(name) for name in PLANNED)
    engine.close()
    return {
        "dtype": dtype,
        "quantize": quantize,
        "parts": {name: plan.run.part_bytes(name) for name in PLANNED},
        "planned_bytes": planned,
        "measured_bytes": measured,
        "planned_over_measured": planned / measured,
    }


def requests(count: int, length: int) -> Iterator[Request]:
    """Yield prompts of about one length, sampled with every filter on."""
    for index in range(count):
        ids = tuple(3 + (index + n) % 90 for n in range(length + index))
        sampling = SamplingParams(
            max_tokens=4,
            ignore_eos=True,
            seed=index,
            temperature=0.8,
            top_p=0.9,
            top_k=50,
            min_p=0.01,
            top_h=0.5,
            repetition_penalty=1.1,
            frequency_penalty=0.1,
            logit_bias=((5, 1.0),),
        )
        yield Request(id=str(index), prompt_token_ids=ids, params=sampling)


def cache_bytes(engine: Engine) -> int:
    """Return what the cache and its journal hold."""
    cache = engine._runner.cache
    return cache.nbytes + cache.journal_nbytes


def main() -> None:
    """Measure all models in all precisions and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(name.replace(", ", "-") for name in MODELS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    disable_progress_bar()
    results = []
    for name, config in MODELS.items():
        if name.replace(", ", "-") not in arguments.models.split(","):
            continue
        small = config["hidden_size"] < 128
        sizes = {"rows": 3, "kv_budget": 40, "chunk": 64} if small else {"rows": 2, "kv_budget": 256, "chunk": 256}
        with tempfile.TemporaryDirectory() as folder:
            save_model(config, Path(folder) / "model")
            for dtype, quantize in (*PRECISIONS, *PACKED):
                made = measure(Path(folder) / "model", dtype=dtype, quantize=quantize, **sizes)
                results.append({"model": name, **sizes, **made})
    write_record("bench.memory", {"results": results}, arguments.out)


if __name__ == "__main__":
    main()
