"""The weights of a decoder as a step of one token wants them: matrices that read the same vector lie together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

_FAMILIES = frozenset({"llama", "mistral", "phi3", "qwen2", "qwen3"})
_PIECES = 8  # products of one matrix that threads share
WORTH_WAKING = 2**24  # multiplications of one product that are worth waking a sleeping thread for


class Projection:
    """Multiply by the weights of linear layers that read the same input: `[B, K]` → `[B, N]`, N over all of them.

    A few vectors times a matrix are fastest where the matrix lies as `[K, N]`; compiled, as a reduction over `[N, K]`.
    """

    def __init__(self, linears: Sequence[nn.Linear], *, threads: int, transposed: bool) -> None:
        self._transposed = transposed
        self.weight = _lay_together(linears, transposed=transposed)
        biases: list[Tensor] = [linear.bias.detach() for linear in linears if "bias" in dict(linear.named_parameters())]
        self.bias = torch.cat(biases) if biases else None
        outputs = sum(linear.out_features for linear in linears)
        self._shared = threads > 1 and outputs % _PIECES == 0

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and len(x) == 1 and not self._transposed:
            product = (self.weight * x).sum(-1)[None]
        elif self._shared and len(x) * self.weight.numel() >= WORTH_WAKING:
            # MKL runs one vector on one thread.
            product = torch.bmm(x.expand(_PIECES, -1, -1), self._pieces()).transpose(0, 1).reshape(len(x), -1)
        elif self._transposed:
            product = torch.mm(x, self.weight)
        else:
            return functional.linear(x, self.weight, self.bias)
        return product if self.bias is None else product + self.bias

    def _pieces(self) -> Tensor:
        """Return the matrix as `[pieces, K, N / pieces]`."""
        if self._transposed:
            return self.weight.view(len(self.weight), _PIECES, -1).transpose(0, 1)
        return self.weight.view(_PIECES, -1, self.weight.shape[1]).transpose(1, 2)


class Norm:
    """Divide by the root of the mean square over the last dimension, and multiply by `weight` `[D]` or `[heads, D]`."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps
        self._twice = torch.cat((weight, weight)) if weight.dim() == 1 else None

    def __call__(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        if torch.compiler.is_compiling():
            return functional.rms_norm(x, (size,), eps=self.eps) * self.weight
        # On a CPU this is one operation of torch for layer norm and six for RMS norm; x beside −x has the mean 0.
        both = torch.layer_norm(torch.cat((x, -x), dim=-1), (2 * size,), self._twice, None, self.eps)[..., :size]
        return both if self._twice is not None else both * self.weight


@dataclass(frozen=True)
class Block:
    """One layer; `head_norm` is for query and key heads together, where a family has such a norm."""

    attention_norm: Norm
    qkv: Projection
    head_norm: Norm | None
    out: Projection
    mlp_norm: Norm
    gate_up: Projection
    down: Projection
    activation: Callable[[Tensor], Tensor]
    scale: float


def make_blocks(model: PreTrainedModel, *, transposed: bool) -> list[Block] | None:
    """Take the layers of a model apart, its own weights becoming views; None when its form is not one known here."""
    known = getattr(model.config, "model_type", None) in _FAMILIES
    layers: Any = model.get_decoder().layers
    linears = [module for module in layers.modules() if "Linear" in type(module).__name__]
    plain = all(type(linear) is nn.Linear for linear in linears)
    rotary: Any = model.get_decoder().rotary_emb
    if not (known and plain) or 2 * rotary.inv_freq.numel() != _head_dim(layers[0].self_attn):
        return None
    how = {"threads": torch.get_num_threads(), "transposed": transposed}
    return [_make_block(layer, how) for layer in layers]


def _make_block(layer: Any, how: Mapping[str, Any]) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    fused = hasattr(attention, "qkv_proj")  # Phi-3
    qkv = [attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj]
    gate_up = [mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj]
    return Block(
        attention_norm=_norm(layer.input_layernorm),
        qkv=Projection(qkv, **how),
        head_norm=_head_norm(attention),
        out=Projection([attention.o_proj], **how),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=Projection(gate_up, **how),
        down=Projection([mlp.down_proj], **how),
        activation=_plain(mlp.activation_fn if fused else mlp.act_fn),
        scale=attention.scaling,
    )


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


def _lay_together(linears: Sequence[nn.Linear], *, transposed: bool) -> Tensor:
    """Return the weights as one matrix, `[K, N]` or `[N, K]`, of which each layer's own is a part from then on."""
    weights = [linear.weight.detach() for linear in linears]
    rows, width = [len(weight) for weight in weights], weights[0].shape[1]
    shape = (width, sum(rows)) if transposed else (sum(rows), width)
    first, strides = weights[0], {(1, shape[1]) if transposed else (shape[1], 1)}
    step = first.element_size() * (1 if transposed else width)
    starts = [first.data_ptr() + step * sum(rows[:i]) for i in range(len(rows))]
    together = len({weight.untyped_storage().data_ptr() for weight in weights}) == 1
    if together and {weight.stride() for weight in weights} == strides and starts == [w.data_ptr() for w in weights]:
        return first.as_strided(shape, (shape[1], 1))
    matrix = torch.cat([weight.t() for weight in weights], dim=1) if transposed else torch.cat(weights)
    for linear, part in zip(linears, torch.split(matrix, rows, dim=1 if transposed else 0), strict=True):
        linear.weight.data = part.t() if transposed else part
    return matrix
