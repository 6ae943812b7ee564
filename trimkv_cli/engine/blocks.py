"""The weights of a decoder as a step of one token wants them: matrices that read the same vector lie together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

_FAMILIES = frozenset({"llama", "mistral", "phi3", "qwen2", "qwen3"})
_PIECES = 8  # products of one matrix that threads share


class Projection:
    """Multiply by the weights of linear layers that read the same input: `[B, K]` → `[B, N]`, N over all of them."""

    def __init__(self, linears: Sequence[nn.Linear], *, threads: int) -> None:
        self.weight = _lay_together(linears)
        biases: list[Tensor] = [linear.bias.detach() for linear in linears if "bias" in dict(linear.named_parameters())]
        self.bias = torch.cat(biases) if biases else None
        self._shared = threads > 1 and self.weight.device.type == "cpu" and len(self.weight) % _PIECES == 0

    def __call__(self, x: Tensor) -> Tensor:
        """A CPU runs one vector times a matrix on one thread: a reduction that is compiled, or pieces, use all."""
        on_cpu = x.device.type == "cpu"
        if on_cpu and torch.compiler.is_compiling() and len(x) == 1:
            product = (self.weight * x).sum(-1)[None]
        elif self._shared:
            pieces = self.weight.view(_PIECES, -1, self.weight.shape[1]).transpose(1, 2)
            product = torch.bmm(x.expand(_PIECES, -1, -1), pieces).transpose(0, 1).reshape(len(x), -1)
        else:
            return functional.linear(x, self.weight, self.bias)
        return product if self.bias is None else product + self.bias


class Norm:
    """Divide by the root of the mean square over the last dimension, and multiply by `weight` `[…, D]`."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return functional.rms_norm(x, (size,), eps=self.eps) * self.weight
        # On a CPU this is one operation of torch for layer norm and six for RMS norm; x beside −x has the mean 0.
        both = functional.layer_norm(torch.cat((x, -x), dim=-1), (2 * size,), eps=self.eps)
        return both[..., :size] * self.weight


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


def make_blocks(model: PreTrainedModel) -> list[Block] | None:
    """Take the layers of a model apart, its own weights becoming views; None when its form is not one known here."""
    known = getattr(model.config, "model_type", None) in _FAMILIES
    layers: Any = model.get_decoder().layers
    linears = [module for module in layers.modules() if "Linear" in type(module).__name__]
    plain = all(type(linear) is nn.Linear for linear in linears)
    rotary: Any = model.get_decoder().rotary_emb
    if not (known and plain) or 2 * rotary.inv_freq.numel() != _head_dim(layers[0].self_attn):
        return None
    threads = torch.get_num_threads()
    return [_make_block(layer, threads) for layer in layers]


def _make_block(layer: Any, threads: int) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    fused = hasattr(attention, "qkv_proj")  # Phi-3
    qkv = [attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj]
    gate_up = [mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj]
    return Block(
        attention_norm=_norm(layer.input_layernorm),
        qkv=Projection(qkv, threads=threads),
        head_norm=_head_norm(attention),
        out=Projection([attention.o_proj], threads=threads),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=Projection(gate_up, threads=threads),
        down=Projection([mlp.down_proj], threads=threads),
        activation=mlp.activation_fn if fused else mlp.act_fn,
        scale=attention.scaling,
    )


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
    """Return the weights as one matrix `[N, K]`, of which each layer's own weight is a part from then on."""
    weights = [linear.weight.detach() for linear in linears]
    first, rows = weights[0], [len(weight) for weight in weights]
    ends = [first.data_ptr() + sum(rows[: i + 1]) * first.stride(0) * first.element_size() for i in range(len(rows))]
    same = {weight.untyped_storage().data_ptr() for weight in weights}
    adjacent = [weight.data_ptr() for weight in weights[1:]] == ends[:-1]
    if len(same) == 1 and adjacent and all(weight.is_contiguous() for weight in weights):
        return first.as_strided((sum(rows), first.shape[1]), first.stride())
    together = torch.cat(weights)
    for linear, part in zip(linears, torch.split(together, rows), strict=True):
        linear.weight.data = part
    return together
