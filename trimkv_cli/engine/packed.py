"""Linear layers in oneDNN's own layout: on a CPU up to three times as fast for several rows at once, and in prefill.

A packed matrix takes the place of the plain one. One row alone is faster with plain ones, see `blocks.Projection`.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimkv_cli.cache.releases import decoder_layers

WORTH_PACKING = 4  # rows


class PackedLinear(nn.Module):
    """Do what `nn.Linear` does, float32 on a CPU; `weight` is opaque, and of the same bytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), WORTH_PACKING)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        self._number = next(_numbers)
        _LAYERS[self._number] = self

    def forward(self, x: Tensor) -> Tensor:
        """Return `[…, out_features]` for `[…, in_features]`."""
        if torch.compiler.is_compiling():
            compiled: Tensor = _multiply(x, self._number, self.out_features)
            return compiled
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product

    def unpacked(self) -> nn.Linear:
        """Return the layer that was packed, bit for bit."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        linear.bias = self.bias
        return linear


# No graph takes a tensor in an opaque layout: to a compiler a packed layer is a number.
_numbers = count()
_LAYERS: WeakValueDictionary[int, PackedLinear] = WeakValueDictionary()


@torch.library.custom_op("trimkv::multiply", mutates_args=())
def _multiply(x: Tensor, layer: int, out_features: int) -> Tensor:  # noqa: ARG001
    product: Tensor = _LAYERS[layer](x)
    return product


_multiply.register_fake(lambda x, _layer, out_features: x.new_empty(*x.shape[:-1], out_features))


class Packed:
    """The packed layers of a model, until `remove`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers = decoder_layers(model)
        self._replace(nn.Linear, PackedLinear)

    def remove(self) -> None:
        """Give the model its plain layers back."""
        self._replace(PackedLinear, PackedLinear.unpacked)

    def _replace(self, kind: type[nn.Module], make: Any) -> None:
        """Replace one layer after the other, so that only one matrix is there twice: nothing here keeps the others."""
        names = [name for name, module in self._layers.named_modules() if type(module) is kind]
        for name in names:
            self._layers.set_submodule(name, make(self._layers.get_submodule(name)))


def pack(model: PreTrainedModel, *, rows: int) -> list[Packed]:
    """Pack the decoder layers of a model where that pays; return what takes it back, if there is anything."""
    able: bool = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
    pays = rows >= WORTH_PACKING and model.device.type == "cpu" and model.dtype == torch.float32
    return [Packed(model)] if able and pays else []
