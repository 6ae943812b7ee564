"""Weights of 4 and 8 bits for a CPU: each matrix packed as it is read, or taken from a GGUF file as it lies there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trimkv_cli.cache.releases import decoder_layers
from trimkv_cli.engine.cpu import (
    PackedEmbedding,
    PackedLinear,
    Scratch,
    pack,
    pack_int4,
    pack_vocabulary,
    settle,
)
from trimkv_cli.loading.packed_cache import Matrix, PackedForm
from trimkv_cli.loading.quantise import Interrupted, misshapen
from trimkv_cli.model.machine import Machine
from trimkv_cli.model.packing import Form, Packed, packs_int4, rows_at_once

_METHOD = "trimkv-packed"


class Stored(Protocol):
    """A weight that is still in its file; `[...]` reads it whole."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def form(self) -> Form | None:
        """What it is held as without loss, or as close as can be; None where the file says nothing of that."""

    def is_floating_point(self) -> bool: ...

    def __getitem__(self, _: EllipsisType) -> Tensor: ...

    def parts(self) -> Iterator[Tensor]:
        """Read a matrix some rows at a time."""

    def levels(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Read some rows at a time of what is int4: as `quantise_int4` returns them."""


class PackingConfig(QuantizationConfigMixin):
    """Carry through `from_pretrained` what becomes of matrices; without a form each is held as it is stored."""

    def __init__(
        self, form: Packed | None, scratch: Scratch, dtype: torch.dtype, *, kept: PackedForm | None = None
    ) -> None:
        super().__init__(quant_method=_METHOD)
        if _METHOD not in AUTO_QUANTIZER_MAPPING:
            register_quantizer(_METHOD)(_Packer)
        self.form = form
        self.scratch = scratch
        self.dtype = dtype
        self.kept = kept
        self.stored: Mapping[str, Stored] = {}
        self.forms: dict[str, Packed] | None = None  # by the name of a weight
        self.scales: dict[str, tuple[Tensor, Tensor | None]] = {}  # of what was read, by the name of its module

    def unread(self, stored: Mapping[str, Stored], known: type, config: Any) -> dict[str, Any]:
        """Take what a model of a known class is to be read from, and return what to give to `from_pretrained`."""
        self.stored = stored
        with torch.device("meta"):
            self.decide(known(config))
        forms = self.forms or {}
        if self.kept is not None:
            self.kept.open(forms)
        return {name: _Shape(weight.shape, self.dtype) if name in forms else weight for name, weight in stored.items()}

    def decide(self, model: Any) -> None:
        """Say of each linear layer of the decoder, and of the vocabulary, what it becomes."""
        self.forms = {}
        names = {module: name for name, module in model.named_modules()}
        for module in (*decoder_layers(model).modules(), *_vocabulary(model)):
            if module in names and (type(module) is nn.Linear or isinstance(module, nn.Embedding)):
                name = f"{names[module]}.weight"
                form = self._form(name, module.weight.shape, is_vocab=module in _vocabulary(model))
                if form != "plain":
                    self.forms[name] = form

    def _form(self, name: str, shape: torch.Size, *, is_vocab: bool) -> Form:
        if self.form is None:
            return self.stored[name].form or "plain" if name in self.stored else "plain"
        if is_vocab or self.form == "int8":
            return "int8"
        return "int4" if packs_int4(*shape) else "plain"

    def keep(self, model: PreTrainedModel) -> None:
        """Let what packing made of a loaded model be kept, if that was slow."""
        if self.kept is not None and self.stored:
            owners: Iterator[tuple[str, Any]] = ((name, model.get_submodule(_owner(name))) for name in self.forms or {})
            self.kept.keep({name: Matrix(each.weight, each.scales, each.columns) for name, each in owners})

    def __deepcopy__(self, _: object) -> PackingConfig:
        return self  # it belongs to one model


def _owner(name: str) -> str:
    """Return the module that has a weight."""
    return name.rpartition(".")[0]


def _vocabulary(model: Any) -> list[nn.Module]:
    """Return the embedding, and the head that has a matrix of its own."""
    head = [] if model.config.tie_word_embeddings else [model.get_output_embeddings()]
    return [model.get_input_embeddings(), *head]


@dataclass(frozen=True, slots=True)
class _Shape:
    """Stand for a weight that is read when it is packed; until then it is only a shape."""

    shape: torch.Size
    dtype: torch.dtype

    def is_floating_point(self) -> bool:
        return True

    def __getitem__(self, _: EllipsisType) -> Tensor:
        return torch.zeros((), dtype=self.dtype).expand(self.shape)


class _Packer(HfQuantizer):
    def update_device_map(self, device_map: Any) -> Any:
        return device_map or {"": torch.device("cpu")}

    def param_needs_quantization(self, _: PreTrainedModel, param_name: str, **__: Any) -> bool:
        return param_name in self.quantization_config.forms

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        return 1.0 if self.param_needs_quantization(model, param_name) else param.element_size()

    def get_quantize_ops(self) -> _Pack:
        return _Pack(self.quantization_config)

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        config: PackingConfig = self.quantization_config
        if config.forms is None:
            config.decide(model)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        for name, form in (config.forms or {}).items():
            owner = _owner(name)
            module = model.get_submodule(owner)
            if module is embedding:
                model.set_input_embeddings(PackedEmbedding(module, config.dtype))
            else:
                model.set_submodule(owner, PackedLinear(module, form, config.scratch))
            if module is embedding and model.config.tie_word_embeddings:
                model.set_output_embeddings(PackedLinear(head, form, config.scratch))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> PreTrainedModel:
        read: dict[str, tuple[Tensor, Tensor | None]] = self.quantization_config.scales
        for name, (scales, columns) in read.items():
            settle(model.get_submodule(name), scales, columns)
        read.clear()
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if isinstance(head, PackedLinear) and head.weight is embedding.weight:
            settle(head, embedding.scales, embedding.columns)
        loaded: PreTrainedModel = model
        return loaded

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


class _Pack(ConversionOps):
    def __init__(self, config: PackingConfig) -> None:
        self._config = config

    def convert(self, input_dict: dict[str, Any], *, model: PreTrainedModel, **_: Any) -> dict[str, Tensor]:
        try:
            return {name: self._packed(name, value, model) for name, value in input_dict.items()}
        except Exception as error:
            raise Interrupted(error) from error

    def _packed(self, name: str, value: Any, model: PreTrainedModel) -> nn.Parameter:
        full = value[0] if isinstance(value, list) else value
        owner = _owner(name)
        module: Any = model.get_submodule(owner)
        if full.shape != module.weight.shape:
            raise misshapen([(name, full.shape, module.weight.shape)])
        kept = self._config.kept
        matrix = kept.read(name) if kept is not None else None
        if matrix is None:
            started = time.thread_time()
            matrix = self._pack(name, full, module, is_vocab=module in _vocabulary(model))
            if kept is not None:
                kept.seconds += time.thread_time() - started
        self._config.scales[owner] = matrix.scales, matrix.columns
        return nn.Parameter(matrix.weight, requires_grad=False)

    def _pack(self, name: str, full: Any, module: Any, *, is_vocab: bool) -> Matrix:
        stored = self._config.stored.get(name)
        if stored is not None and stored.form == module.form == "int4":
            return Matrix(*pack_int4(stored.levels()), None)
        parts = full.split(rows_at_once(full.shape[1])) if stored is None else stored.parts()
        return Matrix(*pack_vocabulary(parts, len(full))) if is_vocab else Matrix(*pack(parts, module.form), None)


def pack_in_place(model: Any, form: Packed, machine: Machine) -> None:
    """Pack the matrices of a model that is in memory, one after the other."""
    config = PackingConfig(form, make_scratch(machine), model.dtype)
    config.decide(model)
    packer, operation = _Packer(config), _Pack(config)
    full = {name: model.get_parameter(name).detach() for name in config.forms or {}}
    packer._process_model_before_weight_loading(model)
    for name in list(full):
        weight = operation.convert({name: full.pop(name)}, model=model)[name]
        model.get_submodule(_owner(name)).weight = weight
    if model.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    packer._process_model_after_weight_loading(model)


def make_scratch(machine: Machine) -> Scratch:
    """Return what matrices are unpacked into where that is faster on a machine."""
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    return Scratch(dtypes[machine.unpacks_to], machine.unpacks_from)
