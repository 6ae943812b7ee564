"""Names that releases of transformers give to the parts of a model that trimkv reaches into."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionLayer

from trimkv_cli.errors import UnsupportedModel
from trimkv_cli.tested import NEWEST, OLDEST_TRANSFORMERS, untested

_CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # from 5.24 on; before; before, in linear attention


def forward_logits(model: PreTrainedModel, ids: Tensor, cache: Cache, **inputs: Any) -> Tensor:
    """Run ids `[B, T]` through a model over a cache; return the logits `[B, V]` of the last column.

    Raises:
        UnsupportedModel: this release has another form.
    """
    return all_logits(model, ids, cache, logits_to_keep=1, **inputs)[:, -1]


def all_logits(model: PreTrainedModel, ids: Tensor, cache: Cache, **inputs: Any) -> Tensor:
    """Run ids `[B, T]` through a model over a cache; return the logits `[B, T, V]`; raises as `forward_logits` does."""
    logits: Tensor = _attribute(
        model(input_ids=ids, use_cache=True, **{cache_argument(model): cache}, **inputs), "logits"
    )
    return logits


def cache_argument(model: Any) -> str:
    """Return the name under which a model takes a cache, in `forward` and in `generate`.

    Raises:
        UnsupportedModel: under none that is known.
    """
    known = _cache_argument(type(model).forward)
    if known is None:
        raise unknown_form("a forward takes no cache")
    return known


@functools.cache
def _cache_argument(forward: Any) -> str | None:
    parameters = inspect.signature(forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), None)


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the keyword arguments of a layer, or of its attention.

    Raises:
        UnsupportedModel: there is none.
    """
    for name in _CACHE_NAMES:
        if arguments.get(name) is not None:
            return arguments[name]
    raise unknown_form("attention layers are given no cache")


def entering(args: tuple[Any, ...], arguments: Mapping[str, Any]) -> Tensor:
    """Return the hidden states `[B, T, hidden]` among the arguments of a layer's `self_attn`.

    Raises:
        UnsupportedModel: there are none.
    """
    states = arguments.get("hidden_states", args[0] if args else None)
    if not isinstance(states, torch.Tensor):
        raise unknown_form("attention layers are given no hidden_states")
    return states


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of a model, each with a `self_attn` or a `linear_attn`.

    Raises:
        UnsupportedModel: they are not where they are known to be.
    """
    layers: nn.ModuleList = _attribute(_decoder(model), "layers")
    for layer in layers:
        attention = getattr(layer, "linear_attn", None)
        _attribute(_attribute(layer, "self_attn") if attention is None else attention, "layer_idx")
    return layers


def with_state(attention: Any, conv: Tensor, recurrent: Tensor) -> dict[str, Cache]:
    """Return the keyword argument that gives a linear attention the state of its rows, to be made the next in place."""
    layer = LinearAttentionLayer()
    layer.conv_states[0], layer.recurrent_states[0], layer.conv_kernel_size[0] = conv, recurrent, conv.shape[-1]
    for known in (layer.is_conv_states_initialized, layer.is_recurrent_states_initialized, layer.has_previous_state):
        known[0] = True
    name = _cache_argument(type(attention).forward)
    if name is None:
        raise unknown_form("a linear attention takes no cache")
    return {name: Cache(layers=[layer] * (attention.layer_idx + 1))}


def rotary_embedding(model: PreTrainedModel) -> Any:
    """Return the module that holds the frequencies of a model's positions.

    Raises:
        UnsupportedModel: it is not where it is known to be.
    """
    return _attribute(_decoder(model), "rotary_emb")


def frequencies(rotary: Any, kind: str | None) -> tuple[Tensor, float]:
    """Return the frequencies `[D / 2]` of a kind of layer, None where all are of one, and what scales cos and sin."""
    prefix = "" if kind is None else f"{kind}_"
    scaling: float = _attribute(rotary, f"{prefix}attention_scaling")
    return _attribute(rotary, f"{prefix}inv_freq"), scaling


def unknown_form(what: str) -> UnsupportedModel:
    """Return the error for a release, or a model's own code, whose form is not known here."""
    newest = NEWEST["transformers"]
    return UnsupportedModel(
        f"transformers {transformers.__version__} has a form that trimkv does not know: {what}",
        hint=f"pip install transformers=={newest}"
        if untested("transformers")
        else f"{OLDEST_TRANSFORMERS} to {newest} work, with the decoders of transformers itself",
    )


def _decoder(model: PreTrainedModel) -> Any:
    find = _attribute(model, "get_decoder")
    return find()


def _attribute(owner: Any, name: str) -> Any:
    found = getattr(owner, name, None)
    if found is None:
        raise unknown_form(f"{type(owner).__name__} has no {name}")
    return found
