"""Decoder layers of the known families, taken apart: which module does what, whatever transformers calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from trimkv_cli.cache.releases import decoder_layers, frequencies, rotary_embedding
from trimkv_cli.model.families import SEQUENTIAL_FAMILIES


class NormParts(NamedTuple):
    """What divides by the root of the mean square and multiplies by `weight` + `offset` (Gemma's is 1)."""

    weight: Tensor
    eps: float
    offset: float


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The parts of one layer in the order of their work; norms that not every family has are None elsewhere.

    Linear layers in a list read the same vector, and are one after the other what the matrix is that does the work of
    all. `rotation` is the kind of layer by which its rotation is known, None where all rotate alike.
    """

    attention_norm: NormParts
    qkv: list[Any]
    query_norm: NormParts | None
    key_norm: NormParts | None
    rotation: str | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    out: Any
    out_norm: NormParts | None
    mlp_norm: NormParts
    gate_up: list[Any]
    activation: Any
    down: Any
    down_norm: NormParts | None


def find_layers(model: PreTrainedModel, is_known: Callable[[nn.Module], bool]) -> list[Layer] | None:
    """Take the layers of a model apart; None when its form, or a linear layer of it, is not one known."""
    known = getattr(model.config, "model_type", None) in SEQUENTIAL_FAMILIES
    layers: Any = decoder_layers(model)
    linears = [module for module in layers.modules() if "Linear" in type(module).__name__]
    if not known or not all(map(is_known, linears)):
        return None
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        return None
    try:
        found = [_take_apart(layer) for layer in layers]
        sizes = {2 * frequencies(rotary_embedding(model), layer.rotation)[0].numel() for layer in found}
    except AttributeError:  # a release with other names: transformers' own forward serves it
        return None
    return found if sizes == {found[0].head_dim} else None


def is_plain(module: nn.Module) -> bool:
    """Tell a linear layer whose weight holds numbers, and nothing of a library that quantised it."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


def norm_parts(module: Any) -> NormParts:
    """Return the parts of a norm of transformers."""
    weight: Tensor = module.weight.detach()
    if "Gemma" in type(module).__name__:
        return NormParts(weight, module.eps, 1.0)
    return NormParts(weight, module.variance_epsilon, 0.0)


def _take_apart(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    config = attention.config
    fused = hasattr(attention, "qkv_proj")  # Phi-3
    four = hasattr(layer, "pre_feedforward_layernorm")  # Gemma: what is added has norms as well
    normed = hasattr(attention, "q_norm")
    return Layer(
        attention_norm=norm_parts(layer.input_layernorm),
        qkv=[attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj],
        query_norm=norm_parts(attention.q_norm) if normed else None,
        key_norm=norm_parts(attention.k_norm) if normed else None,
        rotation=getattr(attention, "layer_type", None) if config.model_type == "gemma3_text" else None,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        out=attention.o_proj,
        out_norm=norm_parts(layer.post_attention_layernorm) if four else None,
        mlp_norm=norm_parts(layer.pre_feedforward_layernorm if four else layer.post_attention_layernorm),
        gate_up=[mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj],
        activation=mlp.activation_fn if fused else mlp.act_fn,
        down=mlp.down_proj,
        down_norm=norm_parts(layer.post_feedforward_layernorm) if four else None,
    )
