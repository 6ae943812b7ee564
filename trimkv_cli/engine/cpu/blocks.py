"""Weights of a decoder laid out for steps of one token: matrices that read the same vector lie together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from trimkv_cli.cache.releases import decoder_layers
from trimkv_cli.engine.cpu.packed import PackedLinear, lay_together, multiply_int4, multiply_int8
from trimkv_cli.engine.layers import Layer, NormParts, find_layers, is_plain, norm_parts
from trimkv_cli.engine.together import one_bias, one_matrix

_PIECE = 64  # outputs of a piece of a matrix
_FEW = 3  # rows for which pieces are faster than the whole
WORTH_WAKING = 2**20  # multiplications of one product that are worth waking a sleeping thread for


class Projection:
    """Multiply by the weights of linear layers that read the same input: `[B, K]` → `[B, N]`, N over all of them."""

    def __init__(self, linears: Sequence[nn.Linear], undo: ExitStack) -> None:
        self.weight = one_matrix(linears, undo)
        self.bias = one_bias(linears)
        outputs, inputs = self.weight.shape
        # A batch of pieces times one vector crosses memory two or three times as fast as MKL's product of the whole.
        self._pieces = self.weight.view(-1, _PIECE, inputs) if outputs % _PIECE == 0 else None
        self.numel = self.weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        if self._pieces is not None and len(x) <= _FEW:
            columns = torch.bmm(self._pieces, x.t().expand(len(self._pieces), -1, -1))  # [pieces, outputs, B]
            product = columns.view(-1, len(x)).t().contiguous()
        else:
            return functional.linear(x, self.weight, self.bias)
        return product if self.bias is None else product + self.bias


class PackedProjection:
    """Do what `Projection` does, with layers of 4 or 8 bits, of one form; the product of four bits is in bfloat16."""

    def __init__(self, linears: Sequence[PackedLinear], undo: ExitStack) -> None:
        self._weight, self._scales = lay_together(linears, undo)
        self._multiply = multiply_int4 if linears[0].form == "int4" else multiply_int8
        self._columns = linears[0].columns
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self.numel = sum(linear.in_features * linear.out_features for linear in linears)

    def __call__(self, x: Tensor) -> Tensor:
        product = self._multiply(x if self._columns is None else x * self._columns, self._weight, self._scales)
        return product if self._bias is None else product + self._bias


class Projections:
    """Do what `Projection` does, with layers that cannot lie together: of different forms, or laid out anew."""

    def __init__(self, each: Sequence[Callable[[Tensor], Tensor]], numel: int) -> None:
        self._each = each
        self.numel = numel

    def __call__(self, x: Tensor) -> Tensor:
        products = [project(x) for project in self._each]
        return torch.cat(products, dim=-1) if len(products) > 1 else products[0]


AnyProjection = Projection | PackedProjection | Projections


def project(linears: Sequence[Any], undo: ExitStack) -> AnyProjection:
    """Return what multiplies by linear layers that read the same input."""
    kinds = {(type(linear), getattr(linear, "form", None)) for linear in linears}
    kind = type(linears[0])
    if len(kinds) > 1 or kind is ReorderedLinear:
        each = linears if kind is ReorderedLinear else [project([linear], undo) for linear in linears]
        return Projections(each, sum(linear.in_features * linear.out_features for linear in linears))
    return PackedProjection(linears, undo) if kind is PackedLinear else Projection(linears, undo)


class Norm:
    """Divide by the root of the mean square over the last dimension, and multiply by `weight` `[D]` or `[heads, D]`."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        size = weight.shape[-1]
        # √(Σx² + D · eps) is one operation on a norm, and what is constant of the rest lies in the weight.
        self._weight = weight.float() * size**0.5
        self._least = torch.tensor((size * eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        size: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return size.hypot_(self._least).reciprocal_().mul(x).mul_(self._weight)


@dataclass(frozen=True)
class Block:
    """One layer; norms that not every family has are None elsewhere, `head_norm` is for query and key heads together.

    `rotation` is the kind of layer by which its rotation is known, None where all rotate alike.
    """

    attention_norm: Norm
    qkv: AnyProjection
    head_norm: Norm | None
    rotation: str | None
    out: AnyProjection
    out_norm: Norm | None
    mlp_norm: Norm
    gate_up: AnyProjection
    down: AnyProjection
    down_norm: Norm | None
    activation: Callable[[Tensor], Tensor]
    scale: float


def make_blocks(model: PreTrainedModel, undo: ExitStack) -> list[Block] | None:
    """Lay the layers of a model out, its weights views until `undo`; None when its form is not one known here."""
    layers = find_layers(model, lambda linear: type(linear) in (ReorderedLinear, PackedLinear) or is_plain(linear))
    return None if layers is None else [_make_block(layer, undo) for layer in layers]


def _make_block(layer: Layer, undo: ExitStack) -> Block:
    return Block(
        attention_norm=_norm(layer.attention_norm),
        qkv=project(layer.qkv, undo),
        head_norm=_head_norm(layer),
        rotation=layer.rotation,
        out=project([layer.out], undo),
        out_norm=None if layer.out_norm is None else _norm(layer.out_norm),
        mlp_norm=_norm(layer.mlp_norm),
        gate_up=project(layer.gate_up, undo),
        down=project([layer.down], undo),
        down_norm=None if layer.down_norm is None else _norm(layer.down_norm),
        activation=_plain(layer.activation),
        scale=layer.scale,
    )


def _plain(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what a module of transformers calls."""
    return torch.ops.aten.silu.default if type(activation).__name__ in ("SiLU", "SiLUActivation") else activation


def make_norm(module: Any) -> Norm:
    """Return the norm of a module of transformers."""
    return _norm(norm_parts(module))


def _norm(parts: NormParts) -> Norm:
    return Norm(parts.weight + parts.offset, parts.eps)


def _head_norm(layer: Layer) -> Norm | None:
    if layer.query_norm is None or layer.key_norm is None:
        return None
    query, key = layer.query_norm.weight, layer.key_norm.weight
    heads = query.expand(layer.num_heads, layer.head_dim), key.expand(layer.num_kv_heads, layer.head_dim)
    return Norm(torch.cat(heads) + layer.query_norm.offset, layer.query_norm.eps)


WORTH_PACKING = 4  # rows


class ReorderedLinear(nn.Module):
    """Do what `nn.Linear` does, float32 on a CPU; `weight` is opaque, and of the same bytes.

    The layer itself waits without a weight until `unpacked`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), WORTH_PACKING)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        self._plain = [linear]  # a list: no part of this module
        linear.weight.data = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[…, out_features]` for `[…, in_features]`."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return product

    def unpacked(self) -> nn.Linear:
        """Return the layer that was packed, bit for bit."""
        linear = self._plain[0]
        linear.weight.data = self.weight.to_dense()
        return linear


def pack(model: PreTrainedModel, undo: ExitStack) -> None:
    """Pack the decoder layers of a model, until `undo`."""
    layers: Any = decoder_layers(model)
    # One layer after the other, so that only one matrix is there twice.
    for name in [name for name, module in layers.named_modules() if is_plain(module)]:
        layers.set_submodule(name, ReorderedLinear(layers.get_submodule(name)))
        undo.callback(_unpack, layers, name)


def _unpack(layers: Any, name: str) -> None:
    layers.set_submodule(name, layers.get_submodule(name).unpacked())


def packing_pays(model: PreTrainedModel, *, rows: int) -> bool:
    """Tell whether decoder layers are faster packed, and can be."""
    able: bool = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
    return able and rows >= WORTH_PACKING and model.device.type == "cpu" and model.dtype == torch.float32
