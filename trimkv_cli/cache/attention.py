"""Attention over a retention cache, hung into unmodified transformers models.

A forward pre-hook on each `self_attn` computes `log_beta` from the hidden states and passes it on, with the layer's
part of the cache, as keyword arguments that reach the attention function. `Cache.update` hands K and V through
unchanged; the attention function attends and evicts, and first has a gate that reads K and V score them. All state
travels on the `RetentionView` that a caller gives as the model's cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trimkv_cli.cache.gates import kv_states
from trimkv_cli.cache.linear_state import State
from trimkv_cli.cache.releases import decoder_layers, entering, given_cache, rotary_embedding, with_state
from trimkv_cli.cache.retention_cache import LayerCache, RetentionCache
from trimkv_cli.cache.retention_gate import RetentionGate
from trimkv_kernels.keydiff import compare_keys

ATTENTION_NAME = "trimkv"


class Gate(Protocol):
    """Score tokens at creation: hidden states `[B, T, hidden]`, positions `[B, T]` → log_beta `[B, T, Hkv]`.

    It is ≤ 0 where scores fade, any finite number where they are static.

    A `RetentionGate` that `reads_kv` is given those as `kv_states` instead.
    """

    def __call__(self, hidden_states: Tensor, positions: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Say what one forward feeds to which rows of the cache.

    `rows` is None in decode: one token for each of the first B rows. `longest` is the largest number of tokens that a
    fed row has seen before; `shortest` the smallest. Tokens before `pinned` of their row are never evicted, and those
    at positions in `spans`, half-open intervals that are empty where they end no later than they begin, not now.
    """

    positions: Tensor  # [B, T] int32, −1 = no token
    rows: Tensor | None  # [B] int64
    longest: int
    shortest: int
    pinned: Tensor | None = None  # [B] int32
    spans: Tensor | None = None  # [B, 2, 2] int32
    lengths: tuple[int, ...] = ()  # in prefill, how many tokens each row is fed, the last of its positions


class RetentionView(Cache):
    """Show a `RetentionCache` to transformers for the forward that `step` describes."""

    def __init__(
        self, cache: RetentionCache, step: Step | None = None, trace: Sequence[list[Tensor]] | None = None
    ) -> None:
        super().__init__(layers=[_PassThrough(self) for _ in (*cache.layers, *cache.states)])
        self.cache = cache
        self.step = step
        self.trace = trace  # when given, trace[layer] collects log_beta [B, Hkv, T] of the forward
        self.tokens_fed = 0

    def step_for(self, layer_index: int, position_ids: Tensor, padding_mask: Tensor | None, batch: int) -> Step:
        """Return the step that layer `layer_index` takes part in."""
        assert self.step is not None, "a serving forward needs a step"
        return self.step

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return self.tokens_fed

    def get_max_length(self, *_: Any, **__: Any) -> int:
        return -1  # no limit: eviction makes room

    def get_max_cache_shape(self, *_: Any, **__: Any) -> int:
        return -1


class GenerationView(RetentionView):
    """Serve `model.generate` as its cache: row i of the batch is row i of the cache."""

    def step_for(self, layer_index: int, position_ids: Tensor, padding_mask: Tensor | None, batch: int) -> Step:
        """Make the step at the first layer, from position ids `[B | 1, T]` and the mask `[B, all tokens so far]`."""
        if layer_index > 0:
            return super().step_for(layer_index, position_ids, padding_mask, batch)
        length = position_ids.shape[1]
        positions = position_ids.to(torch.int32).expand(batch, -1)
        if padding_mask is not None:
            positions = torch.where(padding_mask[:, -length:].bool(), positions, -1)
        seen = self.cache.seen[:batch]
        rows = None if length == 1 and self.tokens_fed else torch.arange(batch, device=positions.device)
        counts = (positions >= 0).sum(dim=1).tolist()
        self.step = Step(positions=positions, rows=rows, longest=max(seen), shortest=min(seen), lengths=tuple(counts))
        self.cache.seen[:batch] = [before + new for before, new in zip(seen, counts, strict=True)]
        self.tokens_fed += length
        return self.step


class _PassThrough(CacheLayerMixin):
    """Satisfy transformers' interface of a cache layer: K and V go through, the attention function stores them."""

    is_compileable = False
    is_sliding = False

    def __init__(self, view: RetentionView) -> None:
        super().__init__()
        self.view = weakref.proxy(view)  # a circle would keep a step's tensors until garbage is collected

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: Any, *_: Any) -> tuple[Any, int]:
        return query_length, 0

    def get_seq_length(self, *_: Any) -> int:
        tokens: int = self.view.tokens_fed
        return tokens

    def get_max_length(self, *_: Any) -> int:
        return -1

    def get_max_cache_shape(self, *_: Any) -> int:
        return -1


def install(model: PreTrainedModel, gates: Sequence[Gate], *, undo: ExitStack, sinks: int = 0) -> None:
    """Make `model` attend over a `RetentionView` given as its cache, with one gate per layer that has keys and values.

    The first `sinks` tokens of each sequence are pinned. The model has no attention without such a view, until `undo`
    takes the gates out again.
    """
    AttentionInterface.register(ATTENTION_NAME, retention_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _padding_mask)
    undo.callback(model.set_attn_implementation, model.config._attn_implementation)
    model.set_attn_implementation(ATTENTION_NAME)
    layers: list[Any] = list(decoder_layers(model))
    attentions = [layer.self_attn for layer in layers if hasattr(layer, "self_attn")]
    for index, (attention, gate) in enumerate(zip(attentions, gates, strict=True)):
        hook = _make_hook(index, gate, sinks, layer_index=attention.layer_idx)
        undo.callback(attention.register_forward_pre_hook(hook, with_kwargs=True).remove)
    recurrences = [layer.linear_attn for layer in layers if hasattr(layer, "linear_attn")]
    for index, recurrence in enumerate(recurrences):
        _keep_states(recurrence, index, undo)
    if hasattr(layers[0], "linear_attn"):
        undo.callback(layers[0].register_forward_pre_hook(_make_step, with_kwargs=True).remove)


def _keep_states(recurrence: Any, index: int, undo: ExitStack) -> None:
    """Let a linear attention take the states of the fed rows from the view, and leave the next ones there."""
    own = recurrence.forward

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        view: RetentionView = given_cache(kwargs)
        step, state = view.step, view.cache.states[index]
        assert step is not None, "the first layer makes it"

        def advance(hidden: Tensor, rows: State) -> Tensor:
            conv = rows.conv.to(hidden.dtype)
            output: Tensor = own(hidden, **with_state(recurrence, conv, rows.recurrent))
            rows.conv.copy_(conv)
            return output

        if step.rows is None:
            return state.decode(hidden_states, advance, position=step.positions[:, 0])
        return state.prefill(hidden_states, advance, rows=step.rows, lengths=step.lengths)

    recurrence.forward = forward
    undo.callback(delattr, recurrence, "forward")


def _make_step(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make the step of a forward before the first layer, which may have no attention that does."""
    view: RetentionView = given_cache(kwargs)
    view.step_for(0, kwargs["position_ids"], kwargs["attention_mask"], entering(args, kwargs).shape[0])


Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


def _make_hook(index: int, gate: Gate, sinks: int, *, layer_index: int) -> Hook:
    reads_kv = isinstance(gate, RetentionGate) and gate.reads_kv

    def pass_log_beta(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        view: RetentionView = given_cache(kwargs)
        hidden = entering(args, kwargs)
        step = view.step_for(layer_index, kwargs["position_ids"], kwargs["attention_mask"], hidden.shape[0])

        def score(states: Tensor) -> Tensor:
            log_beta = gate(states, step.positions).transpose(1, 2)
            if view.trace is not None:
                view.trace[index].append(log_beta)
            if sinks:
                log_beta = log_beta.masked_fill((step.positions < sinks)[:, None], torch.inf)
            if step.pinned is not None:
                log_beta = log_beta.masked_fill((step.positions < step.pinned[:, None])[:, None], torch.inf)
            return log_beta

        ranks = {"score": score} if reads_kv else {"log_beta": score(hidden)}
        return args, {**kwargs, **ranks, "layer_cache": view.cache.layers[index], "step": step}

    return pass_log_beta


def retention_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layer_cache: LayerCache,
    step: Step,
    log_beta: Tensor | None = None,
    score: Callable[[Tensor], Tensor] | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend, then evict: query `[B, Hq, T, D]`, key and value `[B, Hkv, T, D]` → `[B, T, Hq, D]`.

    Either `log_beta` `[B, Hkv, T]` is given, or what finds it from `kv_states`. `s_aux` `[Hq]` are gpt-oss's learned
    sinks: logits of a softmax that have no value.
    """
    if score is not None:
        log_beta = score(kv_states(key, value))
    assert log_beta is not None
    slots, window, operations = layer_cache.slots, layer_cache.window, layer_cache.operations
    fill = min(step.longest, layer_cache.size)
    settings: dict[str, Any] = {"fill": fill, "scale": scaling, "window": window, **layer_cache.ranks}
    settings["spans"] = step.spans
    if layer_cache.compares_keys:
        where: dict[str, Any] = {"rows": step.rows, "fill": fill, "window": window}
        log_beta = compare_keys(key, log_beta, step.positions, slots, **where)
    if s_aux is not None:
        settings["sinks"] = s_aux
    if step.rows is None:
        one = query[:, :, 0], key[:, :, 0], value[:, :, 0], log_beta[:, :, 0], step.positions[:, 0]
        dense = min(step.shortest, layer_cache.size) == fill
        output = operations.decode(*one, slots, layer_cache.journal, dense=dense, **settings)
        return output[:, None], None
    chunk = query, key, value, log_beta, step.positions
    output = operations.prefill(*chunk, slots, rows=step.rows, **settings)
    return output.transpose(1, 2), None


def _padding_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """Hand the 2D padding mask through: visibility follows from positions, which are made from it."""
    return attention_mask


class LongRope:
    """Hold both factor sets of a model, and put one in force for the next forward, until `undo`.

    transformers picks the set from the largest position of the batch; under a name that it does not know it leaves the
    frequencies alone.
    """

    def __init__(self, model: PreTrainedModel, undo: ExitStack) -> None:
        self._rotary = rotary_embedding(model)
        config = self._rotary.config
        original = config.rope_parameters["original_max_position_embeddings"]
        compute = ROPE_INIT_FUNCTIONS["longrope"]
        device = self._rotary.inv_freq.device
        self._sets = [compute(config, device, seq_len=length)[0] for length in (original, original + 1)]
        undo.callback(setattr, self._rotary, "rope_type", self._rotary.rope_type)
        undo.callback(self._rotary.inv_freq.copy_, self._rotary.inv_freq.clone())
        self._rotary.rope_type = "fixed"

    @staticmethod
    def used_by(config: Any) -> bool:
        """Tell whether a model's config asks for long-RoPE."""
        return bool((getattr(config, "rope_parameters", None) or {}).get("rope_type") == "longrope")

    def use(self, *, long: bool) -> None:
        """Rotate with the long or the short factors from now on."""
        chosen: torch.Tensor = self._sets[long]
        self._rotary.inv_freq.copy_(chosen)
