"""What to know of the device that a model runs on: a GPU that is there and not used, or used slowly."""

from __future__ import annotations

import os

import torch

from trimkv_cli.events import Notice
from trimkv_cli.model.driver import has_driver
from trimkv_kernels import triton_obstacle


def device_warnings(asked: str, device: torch.device) -> tuple[Notice, ...]:
    """Warn of a GPU that torch does not see, where `asked` left the choice to it, and of one without Triton."""
    if asked == "auto" and device.type == "cpu" and has_driver() and "CUDA_VISIBLE_DEVICES" not in os.environ:
        message = "there is an NVIDIA GPU that torch does not see: this runs on the CPU (trimkv doctor says why)"
        return (Notice(code="gpu_not_seen", message=message),)
    obstacle = triton_obstacle(device) if device.type == "cuda" else None
    if obstacle is None:
        return ()
    message = f"{obstacle.what}: the slower operations of torch run on {device} instead ({obstacle.remedy})"
    return (Notice(code="no_triton", message=message),)
