"""Retention-gated attention for training, hung into unmodified transformers models.

A forward pre-hook on each `self_attn` computes `log_beta` from the hidden states; the attention function adds
`(t − i) · log_beta_i` to the logits (arXiv 2512.03324v2, equation 3), or shows each query only what a number of slots
would hold of what the teacher has read (`eviction.py`). The same model without either is the teacher. Both attend in
float32 whatever the model computes in, so that KL measures the gates and not rounding. All state travels on the
`TrainingPass` that a caller gives to the decoder as `training_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from trimkv_cli.cache.releases import decoder_layers, entering
from trimkv_cli.train.eviction import attend_to_kept
from trimkv_cli.train.training_pass import TrainingPass, in_query_blocks, recompute

TRAINING_NAME = "trimkv_training"
QUERY_BLOCK = 512  # queries that need a mask attend in blocks: a mask takes block · T, never T · T


def install(model: PreTrainedModel, gates: Sequence[nn.Module], windows: Sequence[int | None]) -> None:
    """Make `model` attend as the `training_pass` of a forward says, with one gate and window per layer."""
    AttentionInterface.register(TRAINING_NAME, attend)
    AttentionMaskInterface.register(TRAINING_NAME, _no_mask)
    model.set_attn_implementation(TRAINING_NAME)
    layers: Any = decoder_layers(model)
    for layer, gate, window in zip(layers, gates, windows, strict=True):
        hook = _make_hook(layer.self_attn.layer_idx, gate, window)
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward pass, and compute the rest again."""
    layers: Any = decoder_layers(model)
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = recompute
        layer.training = True  # the flag of this module alone: dropout below it stays off


def hidden_states(model: PreTrainedModel, token_ids: Tensor, training_pass: TrainingPass) -> Tensor:
    """Run the decoder over `[B, T]` ids, or those of the pass's columns; return what enters the output embedding.

    It is `[B, T, hidden]`, or `[B, Tq, hidden]`.
    """
    decoder: Any = model.get_decoder()
    ids, positions = (training_pass.at(each, slice(None)) for each in (token_ids, training_pass.positions))
    output = decoder(input_ids=ids, position_ids=positions, use_cache=False, training_pass=training_pass)
    states: Tensor = output.last_hidden_state
    return states


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


def _make_hook(layer_index: int, gate: nn.Module, window: int | None) -> Hook:
    def pass_log_beta(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        now: TrainingPass = kwargs["training_pass"]
        hidden = entering(args, kwargs)
        if now.teacher is not None:  # the teacher leaves it there, the student finds it
            hidden = now.teacher.hidden.setdefault(layer_index, hidden)
        log_beta = log_beta_of(gate, hidden, now) if now.gated else None
        if log_beta is not None:
            now.log_betas.setdefault(layer_index, log_beta)  # a checkpointed layer comes here twice
        return args, {**kwargs, "log_beta": log_beta, "window": window}

    return pass_log_beta


def log_beta_of(gate: nn.Module, hidden: Tensor, now: TrainingPass) -> Tensor:
    """Return what a gate says of hidden states `[B, T, hidden]`, in its own dtype: `[B, Hkv, T]`."""
    log_beta: Tensor = gate(hidden.to(next(gate.parameters()).dtype), now.positions)
    return log_beta.transpose(1, 2)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    training_pass: TrainingPass,
    log_beta: Tensor | None,
    window: int | None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally: query `[B, Hq, Tq, D]`, key and value `[B, Hkv, Tq, D]` → `[B, Tq, Hq, D]`.

    `log_beta` `[B, Hkv, T]` makes it the student's attention, differentiable in it.
    """
    if training_pass.teacher is not None:
        layer: Any = module.layer_idx
        key = training_pass.teacher.keys.setdefault(layer, key)
        value = training_pass.teacher.values.setdefault(layer, value)
        if not training_pass.gated and training_pass.teacher.columns is not None:
            columns = training_pass.teacher.columns[:, None, :, None]
            training_pass.teacher.queries[layer] = query.take_along_dim(columns, dim=2) * scaling
    inputs = query.float() * scaling, key.float(), value.float()
    with torch.autocast(query.device.type, enabled=False):
        if log_beta is not None and training_pass.border is not None:
            output = attend_to_kept(*inputs, log_beta.float(), training_pass, window)
        else:
            output = _attend_to_all(*inputs, log_beta, training_pass, window)
    return output[..., : value.shape[3]].to(query.dtype).transpose(1, 2), None


def _attend_to_all(
    query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor | None, now: TrainingPass, window: int | None
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    if log_beta is not None:
        query, key, value = _with_retention(query, key, value, log_beta.repeat_interleave(groups, dim=1), now.positions)
    return _attend_causally(query, key, value, now, window)


def _with_retention(
    query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Add columns whose product is the retention bias: `(t − i) · log_beta_i = [t, 1] · [log_beta_i, −i · log_beta_i]`.

    So no kernel needs to know of it and no T × T tensor is kept. In float32, counted from the middle, the two terms
    cancel to about 1e-7 · T / 2 · log_beta. Two more columns of zeros keep rows aligned.
    """
    times = (positions - positions.amax(dim=1, keepdim=True) / 2).float()[:, None]
    ones, zeros = torch.ones_like(log_beta), torch.zeros_like(log_beta)
    more = [
        (times.expand_as(log_beta), ones, zeros, zeros),
        (log_beta, -times * log_beta, zeros, zeros),
        (zeros, zeros, zeros, zeros),
    ]
    wide = [
        torch.cat([states, torch.stack(columns, dim=3)], dim=3)
        for states, columns in zip((query, key, value), more, strict=True)
    ]
    return wide[0], wide[1], wide[2]


def _attend_causally(query: Tensor, key: Tensor, value: Tensor, now: TrainingPass, window: int | None) -> Tensor:
    """Attend to what the pass lets each query see, all `[B, H, T, D]`; masks exist for a block of queries at a time."""
    if window is None and now.one_document:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
    keep = query.shape[2] <= QUERY_BLOCK or not key.requires_grad
    attend_block = partial(_attend_block, now=now, window=window)
    return in_query_blocks(attend_block, query, key, value, size=QUERY_BLOCK, keep=keep, reach=now.reach)


def _attend_block(
    query: Tensor, key: Tensor, value: Tensor, *, now: TrainingPass, queries: slice, window: int | None
) -> Tensor:
    keys = slice(0, queries.stop)
    visible = now.visible(queries, keys, now.distances(queries, keys), window)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None], scale=1.0)


def _no_mask(*_: Any, **__: Any) -> None:
    """Make no mask: visibility follows from the pass."""
