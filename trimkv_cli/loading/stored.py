"""Checkpoints that are stored quantised: read through transformers, packed or unpacked as the plan counts them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel

from trimkv_cli.loading.quantise import lazy_tensors, settle_layers
from trimkv_cli.model.quantised import Quantised

Loaded = tuple[PreTrainedModel, dict[str, Any]]


def read_quantised(
    folder: Path, stored: Quantised, known: Any, config: Any, *, device: torch.device, **options: Any
) -> Loaded:
    """Read a folder's weights, and leave packed matrices where they are to run.

    `known` is the class of the model, `options` are those of `from_pretrained`.
    """
    if stored.unpacks:
        options["quantization_config"] = _UNPACKED[stored.method]()
    else:
        options["device_map"] = {"": device}
    source: tuple[str | None, Mapping[str, Any]] = (
        (None, {"state_dict": lazy_tensors(folder)}) if stored.streams else (str(folder), {"local_files_only": True})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a config that is given beside the folder's own
        model, report = known.from_pretrained(source[0], config=config, **{**options, **source[1]})
    if stored.method == "bitsandbytes":
        settle_layers(model, device)
    if stored.method == "compressed-tensors":
        _compute_plainly(model)
    return model, report


def _compute_plainly(model: PreTrainedModel) -> None:
    """Leave activations as they are: releases before 5.24 round them, though the matrices are unpacked."""
    from compressed_tensors.quantization import disable_quantization

    model.apply(disable_quantization)


_UNPACKED: Mapping[str, Callable[[], Any]] = {
    "compressed-tensors": lambda: CompressedTensorsConfig(dequantize=True),
    "fp8": lambda: FineGrainedFP8Config(dequantize=True),
    "mxfp4": lambda: Mxfp4Config(dequantize=True),
}
