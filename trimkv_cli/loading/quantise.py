"""Weights in int8 or nf4 through bitsandbytes: the matrices of the decoder layers, each quantised as it is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trimkv_cli.cache.releases import decoder_layers
from trimkv_cli.errors import BrokenModel, ModelError
from trimkv_cli.model.folders import StoredTensor, stored_tensors
from trimkv_cli.model.packing import rows_at_once
from trimkv_cli.model.spec import Quantisation
from trimkv_cli.plan.run import matrix_bytes, packable, quantisable

_METHOD = "trimkv"


class QuantisationConfig(QuantizationConfigMixin):
    """Carry the choice through `from_pretrained`; embeddings and output head stay as they are."""

    def __init__(self, quantize: Quantisation, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(quant_method=_METHOD)
        self.quantize = quantize
        self.dtype = dtype
        self.device = device


def quantisation_config(quantize: Quantisation, dtype: torch.dtype, device: torch.device) -> QuantisationConfig | None:
    """Return what to give to `from_pretrained` as `quantization_config`.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if quantize == "none":
        return None
    _bitsandbytes()
    if _METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(_METHOD)(_Quantizer)
    return QuantisationConfig(quantize, dtype, device)


def _bitsandbytes() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it would warn of casts and of kernels to download
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModelError(
            f"quantised weights need bitsandbytes, which cannot be imported: {str(error).splitlines()[0]}",
            hint="pip install bitsandbytes, or --quantize none",
        ) from error
    return bitsandbytes


class _Quantizer(HfQuantizer):
    def update_device_map(self, device_map: Any) -> Any:
        return device_map or {"": self.quantization_config.device}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        owner, name = param_name.rpartition(".")[::2]
        return name == "weight" and isinstance(model.get_submodule(owner), _quantised_types())

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Return the bytes of one weight: on a GPU transformers allocates all of them at once, before it reads any."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        rows, columns = param.shape
        return matrix_bytes(rows, columns, self.quantization_config.quantize, packs_nf4=False) / param.numel()

    def get_quantize_ops(self) -> _Quantise:
        return _Quantise()

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        layers = decoder_layers(model)
        for name, module in list(layers.named_modules()):
            if type(module) is nn.Linear and quantisable(module.in_features, self.quantization_config.quantize):
                layers.set_submodule(name, _empty(module, self.quantization_config))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, _quantised_types()):
                _settle(module, self.quantization_config.dtype, self.quantization_config.device)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class Interrupted(BaseException):
    """Carry an error out of transformers' loading, which would go on and then name a report that it does not show."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _Quantise(ConversionOps):
    def convert(self, input_dict: dict[str, Any], *, model: PreTrainedModel, **_: Any) -> dict[str, Tensor]:
        try:
            return {name: _converted(name, value, model) for name, value in input_dict.items()}
        except Exception as error:
            raise Interrupted(error) from error


def _converted(name: str, value: Any, model: PreTrainedModel) -> Any:
    full = value[0] if isinstance(value, list) else value
    module: Any = model.get_submodule(name.rpartition(".")[0])
    if full.shape != module.weight.shape:
        raise misshapen([(name, full.shape, module.weight.shape)])
    return _quantised(module, full)


def misshapen(weights: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> BrokenModel:
    """Make the error for stored weights, each with its shape and the one that the config implies."""
    name, stored, expected = weights[0]
    count = "a weight has another shape" if len(weights) == 1 else f"{len(weights)} weights have other shapes"
    return BrokenModel(
        f"{count} than config.json says: {name} is {_shape(stored)}, not {_shape(expected)}",
        hint="config.json and the weights are of different models: get the folder again",
    )


def _shape(sizes: Sequence[int]) -> str:
    return " × ".join(str(size) for size in sizes)


def _quantised(module: Any, full: Tensor) -> Any:
    """Return the weight of a quantised layer, where `full` lies."""
    old = module.weight
    if isinstance(module, _bitsandbytes().nn.Linear4bit):
        made = type(old)(
            full, requires_grad=False, quant_type="nf4", compress_statistics=old.compress_statistics, module=module
        )
        return made.to(full.device)
    # What is on a GPU already stays whole until the first forward: int8 is made on the way there.
    return type(old)(full.to("cpu"), requires_grad=False, has_fp16_weights=False).to(full.device)


def _quantised_types() -> tuple[type, ...]:
    layers = _bitsandbytes().nn
    return layers.Linear4bit, layers.Linear8bitLt


def _empty(module: nn.Linear, config: QuantisationConfig) -> nn.Module:
    """Return a layer of the same shape that holds nothing yet."""
    layers, shape = _bitsandbytes().nn, (module.in_features, module.out_features)
    options: dict[str, Any] = {"bias": module.bias is not None, "device": "meta"}
    if config.quantize == "int8":
        # With a threshold above 0 the columns kept in 16 bits would depend on the whole batch.
        made: nn.Module = layers.Linear8bitLt(*shape, has_fp16_weights=False, threshold=0.0, **options)
    else:
        made = layers.Linear4bit(*shape, compute_dtype=config.dtype, quant_type="nf4", **options)
    return made.requires_grad_(requires_grad=False)


def settle_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Settle the layers of a checkpoint that bitsandbytes stored.

    In int8 no column of activations stays in 16 bits, as in what is quantised here: which ones do would depend on the
    whole batch, and so would the memory.
    """
    for module in model.modules():
        if isinstance(module, _quantised_types()):
            _settle(module, model.dtype, device)
            if isinstance(module, _bitsandbytes().nn.Linear8bitLt):
                module.state.threshold = 0.0


def _settle(module: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Bring a layer into the form that its forwards use: a CPU with bf16 instructions repacks nf4 at the first one."""
    if not isinstance(module, _bitsandbytes().nn.Linear4bit) or device.type != "cpu":
        return
    if not packable(module.out_features):
        module.support_avx512bf16_for_cpu = False
    else:
        module.eval()(torch.zeros(1, module.in_features, dtype=dtype))


DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """Stand for one stored tensor; `[...]` reads it into memory of its own (a mapped file would count beside it)."""

    stored: StoredTensor

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.stored.dtype]

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.stored.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def form(self) -> None:
        """Nothing is said of how it may be held."""

    def __getitem__(self, _: EllipsisType) -> Tensor:
        return self._rows(0, self.shape)

    def parts(self) -> Iterator[Tensor]:
        """Read some rows at a time of a matrix."""
        rows, columns = self.shape
        at_once = rows_at_once(columns)
        for start in range(0, rows, at_once):
            yield self._rows(start, (min(at_once, rows - start), columns))

    def levels(self) -> NoReturn:
        raise AssertionError("plain numbers have no levels")

    def _rows(self, start: int, shape: Sequence[int]) -> Tensor:
        """Read what has that shape from a row on."""
        tensor = torch.empty(tuple(shape), dtype=self.dtype)
        before = start * tensor.nbytes // max(1, shape[0]) if start else 0
        data: Any = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with self.stored.path.open("rb") as file:
            file.seek(self.stored.offset + before)
            read = file.readinto(data)
        if read != len(data):
            raise BrokenModel(f"{self.stored.path} is cut off", hint="get the folder again")
        return tensor


def lazy_tensors(folder: Path) -> dict[str, LazyTensor]:
    """Return name → stored tensor of all safetensors files of a folder.

    Raises:
        BrokenModel: a file that is cut off, or whose header makes no sense.
    """
    wanted = _weight_files(folder)
    return {name: LazyTensor(tensor) for name, tensor in stored_tensors(folder).items() if tensor.path.name in wanted}


def _weight_files(folder: Path) -> set[str]:
    """Name the files that make up the model, as transformers does: an index, else the one, else all."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return set(json.loads(index.read_bytes())["weight_map"].values())
    single = folder / "model.safetensors"
    return {path.name for path in ([single] if single.is_file() else folder.glob("*.safetensors"))}
