"""Kernels of a decode step on a GPU, counted by name without one: each launch of Triton, each operation of torch.

python -m bench.step_kernels [--out FILE]

Models of real sizes are made without memory, and kernels are named instead of launched.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from trimkv_cli.cache.gates import MlpGate
from trimkv_cli.cache.retention_cache import RetentionCache
from trimkv_cli.engine.cuda import make_decoder
from trimkv_kernels import StepOperations

SLOTS = 1024
_META = torch.device("meta")
_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view")
# Sizes of Qwen3-4B, Qwen2.5-7B, Llama-3.1-8B, Mistral-7B, Phi-3-mini and Gemma-3-4B.
FORMS: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_size": 2560, "num_attention_heads": 32, "intermediate_size": 9728, "head_dim": 128},
    "qwen2": {"hidden_size": 3584, "num_attention_heads": 28, "intermediate_size": 18_944},
    "llama": {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 14_336},
    "mistral": {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 14_336, "sliding_window": 4096},
    "phi3": {"hidden_size": 3072, "num_attention_heads": 32, "intermediate_size": 8192, "pad_token_id": 0},
    "gemma3_text": {"hidden_size": 2560, "num_attention_heads": 8, "intermediate_size": 10_240, "head_dim": 256},
}
KV_HEADS = {"qwen3": 8, "qwen2": 4, "llama": 8, "mistral": 8, "phi3": 32, "gemma3_text": 4}


def main() -> None:
    """Count the kernels of every form."""
    from bench.record import write_record  # more of the program than `gpu_run.py` finds on a bare machine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    steps = {form: counted(form, rows=given.rows) for form in FORMS}
    write_record("bench.step_kernels", {"rows": given.rows, "slots": SLOTS, "steps": steps}, given.out)


def counted(form: str, *, rows: int, layers: int = 2) -> dict[str, Any]:
    """Return the kernels of one layer in their order, and those beside the layers, by name."""
    few, more = (names_of_step(form, layers=count, rows=rows) for count in (layers, layers + 1))
    first, per_layer = few.index("_add_norm"), len(more) - len(few)
    layer, last = more[first : first + per_layer], first + (layers + 1) * per_layer
    assert more[first:last] == (layers + 1) * layer, "one layer is not as the other"
    return {"per_layer": per_layer, "layer": layer, "before": more[:first], "after": more[last:]}


def names_of_step(form: str, *, layers: int, rows: int) -> list[str]:
    """Return the names of all kernels of a decode step, in their order."""
    from trimkv_kernels import step

    with real_step(form, layers=layers, rows=rows, device=_META, operations=StepOperations.of(step)) as run:
        with recorded():
            run()  # the first one lists where slots lie
        with recorded() as names:
            run()
    return names


@contextmanager
def real_step(
    form: str, *, layers: int, rows: int, device: torch.device, operations: StepOperations | None = None
) -> Iterator[Callable[[], object]]:
    """Make a model of real sizes with any weights, and gates; yield what does a decode step of it."""
    config = AutoConfig.for_model(
        form, **FORMS[form], num_key_value_heads=KV_HEADS[form], num_hidden_layers=layers, vocab_size=32_768
    )
    heads = KV_HEADS[form]
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        shape: dict[str, Any] = {"input_size": config.hidden_size, "hidden": 512, "num_kv_heads": heads}
        gates = [MlpGate(variant="rg", activation=nn.SiLU(), **shape) for _ in range(layers)]
        ids, position = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int32)
    for gate in gates:
        gate.linear1.bfloat16()
        gate.linear2.bfloat16()
    sizes: dict[str, Any] = {"num_kv_heads": heads, "head_dim": model.get_decoder().layers[0].self_attn.head_dim}
    cache = RetentionCache(
        rows=rows, kv_budget=SLOTS, windows=[None] * layers, dtype=torch.bfloat16, device=device, **sizes
    )
    with ExitStack() as undo:
        how: dict[str, Any] = {"sinks": 0, "evicts": True, "undo": undo, "operations": operations}
        decoder = make_decoder(model, gates, cache, **how)
        assert decoder is not None, "a form that is not known"
        with torch.inference_mode():
            yield lambda: decoder.step(ids, position, dense=False)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Collect the names of kernels; those of Triton do not run."""
    from trimkv_kernels import decode, step

    names: list[str] = []
    with ExitStack() as patches:
        for module, kernels in ((decode, ("_scan", "_merge")), (step, ("_add_norm", "_rotate", "_activate", "_evict"))):
            for kernel in kernels:
                patches.enter_context(mock.patch.object(module, kernel, _Named(kernel, names)))
        patches.enter_context(_Operations(names))
        yield names


class _Named:
    """Stand for a kernel of Triton, and write its name down where it is launched."""

    def __init__(self, name: str, names: list[str]) -> None:
        self._name, self._names = name, names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *_, **__: self._names.append(self._name)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Write down the operations of torch that compute or copy: a kernel each, views and allocations are none."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _ALLOCATIONS:
            self._names.append(name)
        return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    main()
