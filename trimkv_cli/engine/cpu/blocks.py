"""The weights of a decoder as a step of one token wants them: matrices that read the same vector lie together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from trimkv_cli.cache.releases import decoder_layers, rotary_embedding

_FAMILIES = frozenset({"llama", "mistral", "phi3", "qwen2", "qwen3"})
_PIECE = 64  # outputs of a piece of a matrix
_FEW = 3  # rows for which pieces are faster than the whole
WORTH_WAKING = 2**24  # multiplications of one product that are worth waking a sleeping thread for


class Projection:
    """Multiply by the weights of linear layers that read the same input: `[B, K]` → `[B, N]`, N over all of them."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.weight = _lay_together(linears)
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


def make_blocks(model: PreTrainedModel) -> list[Block] | None:
    """Take the layers of a model apart, its own weights becoming views; None when its form is not one known here."""
    known = getattr(model.config, "model_type", None) in _FAMILIES
    layers: Any = decoder_layers(model)
    linears = [module for module in layers.modules() if "Linear" in type(module).__name__]
    plain = all(type(linear) in (nn.Linear, PackedLinear) for linear in linears)
    rotary = rotary_embedding(model)
    if not (known and plain) or 2 * rotary.inv_freq.numel() != _head_dim(layers[0].self_attn):
        return None
    try:
        return [_make_block(layer) for layer in layers]
    except AttributeError:  # a release with other names: transformers' own forward serves it
        return None


def _make_block(layer: Any) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    fused = hasattr(attention, "qkv_proj")  # Phi-3
    qkv = [attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj]
    gate_up = [mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj]
    return Block(
        attention_norm=_norm(layer.input_layernorm),
        qkv=_project(qkv),
        head_norm=_head_norm(attention),
        out=_project([attention.o_proj]),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=_project(gate_up),
        down=_project([mlp.down_proj]),
        activation=_plain(mlp.activation_fn if fused else mlp.act_fn),
        scale=attention.scaling,
    )


def _project(linears: Sequence[Any]) -> AnyProjection:
    return (PackedProjection if type(linears[0]) is PackedLinear else Projection)(linears)


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


def _lay_together(linears: Sequence[nn.Linear]) -> Tensor:
    """Return the weights as one matrix `[N, K]`, of which each layer's own is a part from then on."""
    weights = [linear.weight.detach() for linear in linears]
    rows, width = [len(weight) for weight in weights], weights[0].shape[1]
    first = weights[0]
    starts = [first.data_ptr() + first.element_size() * width * sum(rows[:i]) for i in range(len(rows))]
    together = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    if together and all(w.is_contiguous() for w in weights) and starts == [w.data_ptr() for w in weights]:
        return first.as_strided((sum(rows), width), (width, 1))
    matrix = torch.cat(weights)
    for linear, part in zip(linears, torch.split(matrix, rows), strict=True):
        linear.weight.data = part
    return matrix


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
