"""Gate folders as the authors of KVzap and Fast KVzip write them, with random weights, and plain loops that score."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimkv_cli.model.spec import ModelSpec

Layers = list[dict[str, Tensor]]


def kvzap_layers(spec: ModelSpec, *, hidden: int | None) -> Layers:
    """Draw the tensors of each layer by their names within it."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    if hidden is None:
        shapes: dict[str, tuple[int, ...]] = {
            "weight": (spec.num_kv_heads, spec.hidden_size),
            "bias": (spec.num_kv_heads,),
        }
    else:
        first = {"0.weight": (hidden, spec.hidden_size), "0.bias": (hidden,)}
        shapes = {**first, "2.weight": (spec.num_kv_heads, hidden), "2.bias": (spec.num_kv_heads,)}
    return [{name: draw(*shape) for name, shape in shapes.items()} for _ in range(spec.num_layers)]


def write_kvzap(folder: Path, spec: ModelSpec, *, hidden: int | None = 24, **config: Any) -> Layers:
    layers = kvzap_layers(spec, hidden=hidden)
    sizes = {"input_dim": spec.hidden_size, "output_dim": spec.num_kv_heads, "n_modules": spec.num_layers}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["KVzapModel"], "model_type": "kvzap", "hidden_dim": hidden, **sizes, **config})
    )
    flat = {f"layers.{index}.{name}": tensor for index, layer in enumerate(layers) for name, tensor in layer.items()}
    save_file(flat, folder / "model.safetensors")
    return layers


def kvzap_score(layer: dict[str, Tensor], hidden_states: Tensor) -> list[list[float]]:
    """Score tokens `[T, hidden]` by loops over numbers: `[T][Hkv]`."""

    def linear(name: str, inputs: list[float]) -> list[float]:
        weight, bias = layer[f"{name}weight"].tolist(), layer[f"{name}bias"].tolist()
        return [sum(w * x for w, x in zip(row, inputs, strict=True)) + b for row, b in zip(weight, bias, strict=True)]

    scores = []
    for token in hidden_states.tolist():
        if "weight" in layer:
            scores.append(linear("", token))
        else:
            inner = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in linear("0.", token)]
            scores.append(linear("2.", inner))
    return scores


def fastkvzip_layers(spec: ModelSpec, *, count: int) -> Layers:
    """Draw the tensors of each layer by their names within it."""
    generator = torch.Generator().manual_seed(4)
    heads, groups = spec.num_kv_heads, spec.num_heads // spec.num_kv_heads
    shapes = {
        "k_base": (heads, 1, 16, 16),
        "b": (heads, 1, groups),
        "q_proj.weight": (heads * groups * 16, spec.hidden_size),
        "q_proj.bias": (heads * groups * 16,),
        "k_proj.weight": (heads * 16, spec.hidden_size),
        "q_norm.weight": (16,),
        "k_norm.weight": (16,),
    }
    return [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(count)]


def write_fastkvzip(folder: Path, spec: ModelSpec, *, count: int | None = None, groups: int | None = None) -> Layers:
    """Write a file as training leaves it: beside the gates, losses as numpy's arrays."""
    import numpy as np

    layers = fastkvzip_layers(spec, count=spec.num_layers if count is None else count)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"q{groups or spec.num_heads // spec.num_kv_heads}_dim16_sink16.pt"
    curve = np.array([[0.5, 0.25]] * 3)
    content = {"module": layers, "loss": curve, "acc": curve.astype(np.float32), "best": curve.mean()}
    torch.save(content, folder / name)
    return layers


def fastkvzip_score(layer: dict[str, Tensor], hidden_states: Tensor) -> list[list[float]]:
    """Score tokens `[T, hidden]` by loops over heads, groups and learned keys: `[T][Hkv]`."""
    heads, _, groups = layer["b"].shape

    def normed(states: Tensor, weight: Tensor) -> Tensor:
        return states / (states.square().mean() + 1e-6).sqrt() * weight

    scores = []
    for token in hidden_states.double():
        query = layer["q_proj.weight"].double() @ token + layer["q_proj.bias"]
        key = layer["k_proj.weight"].double() @ token
        row = []
        for head in range(heads):
            own = normed(key[head * 16 : head * 16 + 16], layer["k_norm.weight"])
            shares = []
            for group in range(groups):
                start = (head * groups + group) * 16
                asks = normed(query[start : start + 16], layer["q_norm.weight"])
                logit = float(own @ asks) / 4 + float(layer["b"][head, 0, group])
                base = [float(known.double() @ asks) / 4 for known in layer["k_base"][head, 0]]
                shares.append(1 / (1 + sum(math.exp(one - logit) for one in base)))
            row.append(sum(shares) / groups)
        scores.append(row)
    return scores
