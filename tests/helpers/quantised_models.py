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
MXFP4: dict[str, Any] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
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
    """Save a tiny model, its matrices in FP8 by blocks or rows where the settings say so, or experts in MXFP4."""
    make_model(family, **changes).save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if settings["quant_method"] == "mxfp4" and name.endswith(("experts.down_proj", "experts.gate_up_proj")):
            experts, inner, outer = weight.shape
            shape = (experts, outer, inner // _BLOCK, _BLOCK // 2)
            tensors[f"{name}_blocks"] = torch.randint(256, shape, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(121, 124, shape[:3], dtype=torch.uint8)
        elif "_proj" not in name or settings["quant_method"] not in ("fp8", "compressed-tensors"):
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
        if f"{name}_blocks" in tensors:
            parameter.data = _from_fp4(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
    return model


def _from_fp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return `[experts, inputs, outputs]` of blocks of 32 inputs, two in a byte, each block with its power of 2."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).int()
    values = _FP4[codes & 7] * (1 - 2 * (codes >> 3))
    return (values * 2.0 ** (scales.float()[..., None] - 127)).flatten(-2).transpose(1, 2).contiguous()


def set_config(folder: Path, **changes: Any) -> None:
    """Change keys of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
