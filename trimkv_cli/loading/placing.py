"""Weights that go to a GPU as they are read, so that host memory holds one of them at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trimkv_cli.loading.quantise import Interrupted, misshapen

_METHOD = "trimkv_placing"


class PlacingConfig(QuantizationConfigMixin):
    """Carry the device through `from_pretrained`, which takes a `device_map` only where accelerate is installed.

    To transformers this is a way to quantise: each tensor is handed over before the next one is read.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(quant_method=_METHOD)
        self.dtype = dtype
        self.device = device


def placing_config(dtype: torch.dtype, device: torch.device) -> PlacingConfig:
    """Return what to give to `from_pretrained` as `quantization_config`; `forget_placing` belongs to it."""
    if _METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(_METHOD)(_Placer)
    return PlacingConfig(dtype, device)


def forget_placing(model: PreTrainedModel) -> None:
    """Let a model that was read so be one that is not quantised."""
    model.hf_quantizer.remove_quantization_config(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.is_quantized = False


class _Placer(HfQuantizer):
    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return bool(model.get_parameter_or_buffer(param_name).dtype == self.quantization_config.dtype)

    def get_quantize_ops(self) -> _Place:
        return _Place(self.quantization_config.device)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _Place(ConversionOps):
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def convert(self, input_dict: dict[str, Any], *, model: PreTrainedModel, **_: Any) -> dict[str, Tensor]:
        try:
            return {name: self._placed(name, value, model) for name, value in input_dict.items()}
        except Exception as error:
            raise Interrupted(error) from error

    def _placed(self, name: str, value: Any, model: PreTrainedModel) -> Tensor:
        whole: Tensor = value[0] if isinstance(value, list) else value
        expected = model.get_parameter_or_buffer(name).shape
        if whole.shape != expected:
            raise misshapen([(name, whole.shape, expected)])
        return whole.to(self._device)
