"""Weights of a decoder laid out for steps of one token: matrices that read the same vector lie together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from trimkv_cli.cache.releases import decoder_layers, rotary_embedding
from trimkv_cli.model.families import SEQUENTIAL_FAMILIES

_PIECE = 64  # outputs of a piece of a matrix
_FEW = 3  # rows for which pieces are faster than the whole
WORTH_WAKING = 2**24  # multiplications of one product that are worth waking a sleeping thread for


class Projection:
    """Multiply by the weights of linear layers that read the same input: `[B, K]` → `[B, N]`, N over all of them."""

    def __init__(self, linears: Sequence[nn.Linear], undo: ExitStack) -> None:
        self.weight = _lay_together(linears, undo)
        biases: list[Tensor] = [linear.bias.detach() for linear in linears if "bias" in dict(linear.named_parameters())]
        self.bias = torch.cat(biases) if biases else None
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
    """Do what `Projection` does, with packed layers."""

    def __init__(self, linears: Sequence[PackedLinear]) -> None:
        self._linears = linears
        self.numel = sum(linear.in_features * linear.out_features for linear in linears)

    def __call__(self, x: Tensor) -> Tensor:
        products = [linear(x) for linear in self._linears]
        return torch.cat(products, dim=-1) if len(products) > 1 else products[0]


AnyProjection = Projection | PackedProjection


class Norm:
    """Divide by the root of the mean square over the last dimension, and multiply by `weight` `[D]` or `[heads, D]`."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps
        self._twice = torch.cat((weight, weight)) if weight.dim() == 1 else None

    def __call__(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        # On a CPU this is one operation of torch for layer norm and six for RMS norm; x beside −x has the mean 0.
        both = torch.layer_norm(torch.cat((x, -x), dim=-1), (2 * size,), self._twice, None, self.eps)[..., :size]
        return both if self._twice is not None else both * self.weight


@dataclass(frozen=True)
class Block:
    """One layer; `head_norm` is for query and key heads together, where a family has such a norm."""

    attention_norm: Norm
    qkv: AnyProjection
    head_norm: Norm | None
    out: AnyProjection
    mlp_norm: Norm
    gate_up: AnyProjection
    down: AnyProjection
    activation: Callable[[Tensor], Tensor]
    scale: float


def make_blocks(model: PreTrainedModel, undo: ExitStack) -> list[Block] | None:
    """Take the layers of a model apart, its weights views until `undo`; None when its form is not one known here."""
    known = getattr(model.config, "model_type", None) in SEQUENTIAL_FAMILIES
    layers: Any = decoder_layers(model)
    linears = [module for module in layers.modules() if "Linear" in type(module).__name__]
    plain = all(type(linear) is PackedLinear or _is_plain(linear) for linear in linears)
    rotary = rotary_embedding(model)
    if not (known and plain) or 2 * rotary.inv_freq.numel() != _head_dim(layers[0].self_attn):
        return None
    try:
        return [_make_block(layer, undo) for layer in layers]
    except AttributeError:  # a release with other names: transformers' own forward serves it
        return None


def _is_plain(module: nn.Module) -> bool:
    """Tell a linear layer whose weight holds numbers, and nothing of a library that quantised it."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def _make_block(layer: Any, undo: ExitStack) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    fused = hasattr(attention, "qkv_proj")  # Phi-3
    qkv = [attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj]
    gate_up = [mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj]
    return Block(
        attention_norm=_norm(layer.input_layernorm),
        qkv=_project(qkv, undo),
        head_norm=_head_norm(attention),
        out=_project([attention.o_proj], undo),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=_project(gate_up, undo),
        down=_project([mlp.down_proj], undo),
        activation=_plain(mlp.activation_fn if fused else mlp.act_fn),
        scale=attention.scaling,
    )


def _project(linears: Sequence[Any], undo: ExitStack) -> AnyProjection:
    return PackedProjection(linears) if type(linears[0]) is PackedLinear else Projection(linears, undo)


def _plain(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return what a module of transformers calls."""
    return functional.silu if type(activation).__name__ in ("SiLU", "SiLUActivation") else activation


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)


def _head_norm(attention: Any) -> Norm | None:
    if not hasattr(attention, "q_norm"):
        return None
    config, dim = attention.config, _head_dim(attention)
    query = attention.q_norm.weight.detach().expand(config.num_attention_heads, dim)
    key = attention.k_norm.weight.detach().expand(config.num_key_value_heads, dim)
    return Norm(torch.cat([query, key]), attention.q_norm.variance_epsilon)


def _head_dim(attention: Any) -> int:
    dim: int = attention.head_dim
    return dim


def _lay_together(linears: Sequence[nn.Linear], undo: ExitStack) -> Tensor:
    """Return the weights as one matrix `[N, K]`, of which each layer's own is a part until `undo`."""
    weights = [linear.weight for linear in linears]
    if len(weights) == 1 and weights[0].is_contiguous():
        return weights[0].detach()
    matrix = torch.cat([weight.detach() for weight in weights])
    make_parts(weights, torch.split(matrix, [len(weight) for weight in weights]), undo)
    return matrix


def make_parts(parameters: Iterable[Tensor], parts: Iterable[Tensor], undo: ExitStack) -> None:
    """Let parameters lie where equal parts of one tensor do, and alone again after `undo`."""
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
        undo.callback(_lie_alone, parameter)


def _lie_alone(parameter: Tensor) -> None:
    parameter.data = parameter.data.clone()


WORTH_PACKING = 4  # rows


class PackedLinear(nn.Module):
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
    for name in [name for name, module in layers.named_modules() if _is_plain(module)]:
        layers.set_submodule(name, PackedLinear(layers.get_submodule(name)))
        undo.callback(_unpack, layers, name)


def _unpack(layers: Any, name: str) -> None:
    layers.set_submodule(name, layers.get_submodule(name).unpacked())


def packing_pays(model: PreTrainedModel, *, rows: int) -> bool:
    """Tell whether decoder layers are faster packed, and can be."""
    able: bool = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]
    return able and rows >= WORTH_PACKING and model.device.type == "cpu" and model.dtype == torch.float32
