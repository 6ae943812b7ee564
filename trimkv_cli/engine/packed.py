"""Linear layers in oneDNN's own layout: on a CPU up to three times as fast for several rows at once, and in prefill.

A packed matrix takes the place of the plain one. One row alone is faster with plain ones, see `blocks.Projection`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

WORTH_PACKING = 4  # rows


class PackedLinear(nn.Module):
    """Do what `nn.Linear` does, float32 on a CPU; `weight` is opaque, and of the same bytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), WORTH_PACKING)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return `[…, out_features]` for `[…, in_features]`."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product

    def unpacked(self) -> nn.Linear:
        """Return the layer that was packed, bit for bit."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.to_dense(), requires_grad=False)
        linear.bias = self.bias
        return linear


class Packed:
    """The packed layers of a model, until `remove`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers: Any = model.get_decoder().layers
        self._replace(nn.Linear, PackedLinear)

    def remove(self) -> None:
        """Give the model its plain layers back."""
        self._replace(PackedLinear, PackedLinear.unpacked)

    def _replace(self, kind: type[nn.Module], make: Any) -> None:
        """Replace one layer after the other, so that only one matrix is there twice."""
        for name, module in list(self._layers.named_modules()):
            if type(module) is kind:
                self._layers.set_submodule(name, make(module))


def pack(model: PreTrainedModel, *, rows: int) -> list[Packed]:
    """Pack the decoder layers of a model where that pays; return what takes it back, if there is anything."""
    able: bool = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
    pays = rows >= WORTH_PACKING and model.device.type == "cpu" and model.dtype == torch.float32
    return [Packed(model)] if able and pays else []
