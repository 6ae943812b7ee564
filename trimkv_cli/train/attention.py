"""Retention-gated attention for training, hung into unmodified transformers models.

A forward pre-hook on each `self_attn` computes `log_beta` from the hidden states; the attention function adds
`(t − i) · log_beta_i` to the logits (arXiv 2512.03324v2, equation 3). The same model without the bias is the teacher.
All state travels on the `TrainingPass` that a caller gives to the decoder as `training_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

TRAINING_NAME = "trimkv_training"
QUERY_BLOCK = 512  # queries attend in blocks, so that logits take block · T and never T · T


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPass:
    """Say what one forward sees, and whether it is the student's.

    Several documents may share a row; none sees another. The student leaves each layer's `log_beta` `[B, Hkv, T]` in
    `log_betas`.
    """

    positions: Tensor  # [B, T] int64, increasing within a document
    documents: Tensor  # [B, T] int64, −1 = padding
    gated: bool
    log_betas: dict[int, Tensor] = field(default_factory=dict)

    def distances(self, queries: slice, keys: slice) -> Tensor:
        """Return how many positions each query is after each key: `[B, Tq, Tk]`, float32."""
        return (self.positions[:, queries, None] - self.positions[:, None, keys]).float()

    def visible(self, queries: slice, keys: slice, distances: Tensor, window: int | None) -> Tensor:
        """Return which keys each query may see: `[B, Tq, Tk]`."""
        index = torch.arange(self.positions.shape[1], device=self.positions.device)
        seen = index[queries, None] >= index[None, keys]
        seen = seen & (self.documents[:, queries, None] == self.documents[:, None, keys])
        return seen if window is None else seen & (distances < window)


def install(model: PreTrainedModel, gates: Sequence[nn.Module], windows: Sequence[int | None]) -> None:
    """Make `model` attend as the `training_pass` of a forward says, with one gate and window per layer."""
    AttentionInterface.register(TRAINING_NAME, attend)
    AttentionMaskInterface.register(TRAINING_NAME, _no_mask)
    model.set_attn_implementation(TRAINING_NAME)
    layers: Any = model.get_decoder().layers
    for layer, gate, window in zip(layers, gates, windows, strict=True):
        hook = _make_hook(layer.self_attn.layer_idx, gate, window)
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward pass, and compute the rest again."""
    layers: Any = model.get_decoder().layers
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        layer.training = True  # the flag of this module alone: dropout below it stays off


def hidden_states(model: PreTrainedModel, token_ids: Tensor, training_pass: TrainingPass) -> Tensor:
    """Run the decoder over `[B, T]` ids; return what enters the output embedding, `[B, T, hidden]`."""
    decoder: Any = model.get_decoder()
    output = decoder(
        input_ids=token_ids, position_ids=training_pass.positions, use_cache=False, training_pass=training_pass
    )
    states: Tensor = output.last_hidden_state
    return states


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


def _make_hook(layer_index: int, gate: nn.Module, window: int | None) -> Hook:
    def pass_log_beta(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        now: TrainingPass = kwargs["training_pass"]
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        log_beta = gate(hidden, now.positions).transpose(1, 2) if now.gated else None
        if log_beta is not None:
            now.log_betas.setdefault(layer_index, log_beta)  # a checkpointed layer comes here twice
        return args, {**kwargs, "log_beta": log_beta, "window": window}

    return pass_log_beta


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
    """Attend causally: query `[B, Hq, T, D]`, key and value `[B, Hkv, T, D]` → `[B, T, Hq, D]`.

    `log_beta` `[B, Hkv, T]` makes it the student's attention, differentiable in it.
    """
    length = query.shape[2]
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        block = _Block(training_pass, slice(start, end), window, scaling)
        seen = query[:, :, start:end], key[:, :, :end], value[:, :, :end]
        if log_beta is None:
            outputs.append(block.teach(*seen))
        elif length <= QUERY_BLOCK:
            outputs.append(block.learn(*seen, log_beta))
        else:
            inputs = *seen, log_beta[:, :, :end]
            outputs.append(checkpoint(block.learn, *inputs, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


@dataclass(frozen=True, slots=True)
class _Block:
    """Some queries of a pass, over all keys that are not after the last of them."""

    now: TrainingPass
    queries: slice
    window: int | None
    scaling: float

    def teach(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend without retention: `[B, Hq, Tq, D]`."""
        _, visible = self._sight()
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible[:, None], scale=self.scaling
        )

    def learn(self, query: Tensor, key: Tensor, value: Tensor, log_beta: Tensor) -> Tensor:
        """Attend with the retention bias of each KV head on all its query heads: `[B, Hq, Tq, D]`."""
        distances, visible = self._sight()
        bias = (distances[:, None] * log_beta[:, :, None]).masked_fill(~visible[:, None], -torch.inf)
        batch, heads, length, width = query.shape
        kv_heads = key.shape[1]
        grouped = (query * self.scaling).reshape(batch, kv_heads, -1, width)
        logits = (grouped @ key.transpose(2, 3)).view(batch, kv_heads, heads // kv_heads, length, -1)
        shares = torch.softmax(logits.float() + bias[:, :, None], dim=-1).to(value.dtype)
        return (shares.view(batch, kv_heads, grouped.shape[2], -1) @ value).view(batch, heads, length, -1)

    def _sight(self) -> tuple[Tensor, Tensor]:
        keys = slice(0, self.queries.stop)
        distances = self.now.distances(self.queries, keys)
        return distances, self.now.visible(self.queries, keys, distances, self.window)


def _no_mask(*_: Any, **__: Any) -> None:
    """Make no mask: visibility follows from the pass."""
