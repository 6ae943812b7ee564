"""Tiny checkpoints as quantising libraries store them, the libraries themselves not needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_models import make_model

_BLOCK = 32
FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [_BLOCK, _BLOCK]}
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_FLOAT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_FLOAT8, "strategy": "token", "dynamic": True},
        }
    },
}


def save_quantised(folder: Path, settings: dict[str, Any], family: str = "qwen3", **changes: Any) -> Path:
    """Save a tiny model, its matrices in FP8 by blocks or rows where the settings say so."""
    make_model(family, **changes).save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj" not in name or settings["quant_method"] not in ("fp8", "compressed-tensors"):
            tensors[name] = weight
        elif settings["quant_method"] == "fp8":
            rows, columns = weight.shape
            blocks = weight.view(rows // _BLOCK, _BLOCK, columns // _BLOCK, _BLOCK)
            scale = blocks.abs().amax((1, 3)) / 448
            tensors[name] = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
        else:
            scale = weight.abs().amax(1, keepdim=True) / 448
            tensors[name], tensors[f"{name}_scale"] = (weight / scale).to(torch.float8_e4m3fn), scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, quantization_config=settings)
    return folder


def unpacked_model(folder: Path, family: str = "qwen3", **changes: Any) -> Any:
    """Return the model that `save_quantised` stored, each matrix times its scales."""
    model, tensors = make_model(family, **changes), load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        scale = tensors.get(f"{name}_scale_inv", tensors.get(f"{name}_scale"))
        if scale is not None:
            by_block = scale.repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
            factors = scale if f"{name}_scale" in tensors else by_block
            parameter.data = tensors[name].float() * factors
    return model


def set_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
