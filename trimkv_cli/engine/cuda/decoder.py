"""Decode steps on a GPU, one token per row, with ten kernels a layer.

The modules of transformers launch sixty. Here matrices that read the same vector are one, what stands between two
products is one kernel, and retention gates and eviction of all layers come together after the last one. Weights that a
library quantised stay with its modules, and keys that are compared are so layer by layer: both cost kernels more. A
step reads nothing on the host, so that a CUDA graph can be made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from trimkv_cli.cache.releases import frequencies
from trimkv_cli.cache.retention_cache import RetentionCache
from trimkv_cli.engine.layers import Layer, NormParts, find_layers, is_plain, norm_parts
from trimkv_cli.engine.together import GatesTogether, one_bias, one_matrix
from trimkv_kernels import StepOperations, step_operations_for
from trimkv_kernels.keydiff import compare_keys
from trimkv_kernels.step_reference import Norm

_ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}

Product = Callable[[Tensor], Tensor]  # [B, K] → [B, N]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One layer; norms that not every family has are None elsewhere."""

    attention_norm: Norm
    qkv: Product
    head_norms: dict[str, Norm]
    rotation: str | None
    scale: float
    out: Product
    out_norm: Norm | None
    mlp_norm: Norm
    gate_up: Product
    activation: str
    down: Product
    down_norm: Norm | None


class Decoder:
    """Own the blocks of a model, for decode steps over one cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        gates: Sequence[nn.Module],
        cache: RetentionCache,
        operations: StepOperations,
        *,
        sinks: int,
        evicts: bool,
        undo: ExitStack,
    ) -> None:
        decoder: Any = model.get_decoder()
        self._blocks = blocks
        self._gates = GatesTogether(gates, undo, at_once=True)
        self._cache = cache
        self._operations = operations
        self._sinks = sinks  # the first tokens of a sequence, which are pinned
        self._evicts = evicts
        self._embed = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._rotations = sorted({block.rotation for block in blocks}, key=str)
        self._norm = Norm(*norm_parts(decoder.norm))
        self._head: Any = model.get_output_embeddings()

    def forget(self) -> None:
        """Do nothing before slots move: the cache knows where they lie."""

    def step(
        self,
        ids: Tensor,
        position: Tensor,
        *,
        dense: bool,  # noqa: ARG002  # the mask costs nothing here
        shown: Tensor | None = None,
        spans: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Feed `ids` `[B]` at `position` `[B]` int32 to the first B rows, and keep the best M of each head.

        A row at −1 has no token: its slots stay as they are. `shown` `[B]` are the positions that the model sees, when
        they are others; what lies in `spans` `[B, 2, 2]` int32 is protected.

        Returns:
            The logits `[B, V]`, and log_beta `[L, B, Hkv]` of the tokens.
        """
        ranks: dict[str, Any] = {**self._cache.layers[0].ranks, "spans": spans}
        run = self._operations
        angles = (position if shown is None else shown).clamp(min=0)[:, None].float()
        rotations = {kind: self._rotation(angles, kind) for kind in self._rotations}
        x: Tensor = self._embed(ids)
        layers, rows, heads, dim = len(self._blocks), len(ids), *self._cache.layers[0].slots.key.shape[1::2]
        entering = x.new_empty(layers, rows, x.shape[1])
        keys, values = x.new_empty(2, layers, rows, heads, dim)
        lowest = torch.empty(layers, rows, heads, dtype=torch.float32, device=x.device)
        loser = torch.empty(layers, rows, heads, dtype=torch.int32, device=x.device)
        compared = torch.zeros_like(lowest) if self._evicts and self._cache.layers[0].compares_keys else None
        added, before = None, None
        for i, (block, layer) in enumerate(zip(self._blocks, self._cache.layers, strict=True)):
            hidden = run.add_norm(x, added, block.attention_norm, before=before, out=entering[i])
            new = {"key": keys[i], "value": values[i]}
            query = run.rotate(block.qkv(hidden), *rotations[block.rotation], **new, **block.head_norms)
            if compared is not None:  # scores of all keys, so that a loser can be found
                where: dict[str, Any] = {"rows": None, "fill": layer.size, "window": layer.window}
                new_key, unpinned = keys[i, :, :, None], compared[i, ..., None]
                compared[i] = compare_keys(new_key, unpinned, position[:, None], layer.slots, **where)[..., 0]
            found = {"lowest": lowest[i], "loser": loser[i]} if self._evicts else {}
            how: dict[str, Any] = {"scale": block.scale, "window": layer.window, **ranks}
            attended = run.attend(query, keys[i], values[i], position, layer.slots, **found, **how)
            hidden = run.add_norm(x, block.out(attended.flatten(1)), block.mlp_norm, before=block.out_norm)
            added, before = block.down(run.activate(block.gate_up(hidden), block.activation)), block.down_norm
        logits: Tensor = self._head(run.add_norm(x, added, self._norm, before=before))
        read = torch.cat((keys.flatten(2), values.flatten(2)), dim=-1) if self._gates.read_kv else entering
        log_beta = self._gates(read, position)
        ranked = log_beta if compared is None else compared
        ranked = ranked.masked_fill((position < self._sinks)[:, None], torch.inf) if self._sinks else ranked
        if self._evicts:
            run.evict(keys, values, ranked, position, self._cache.table, lowest=lowest, loser=loser, **ranks)
        return logits, log_beta

    def _rotation(self, position: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        """Return cos and signed sin, `[B, D]`: x · cos + roll(x, D / 2) · sin rotates x."""
        inv_freq, scaling = frequencies(self._rotary, kind)
        angles = position * inv_freq
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def make_decoder(
    model: PreTrainedModel,
    gates: Sequence[nn.Module],
    cache: RetentionCache,
    *,
    sinks: int,
    evicts: bool,
    undo: ExitStack,
    operations: StepOperations | None = None,
) -> Decoder | None:
    """Return a decoder for the model, or None when its form, or the cache's, is not one known here.

    `operations` are those of the model's device unless others are given. `undo` gives the model back as it was.
    """
    operations = operations or step_operations_for(model.device)
    if operations is None or cache.states:
        return None
    layers = find_layers(model, lambda _: True)
    if layers is None or any(type(layer.activation).__name__ not in _ACTIVATIONS for layer in layers):
        return None
    blocks = [_make_block(layer, undo) for layer in layers]
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # where matrices lay before they lay together
    return Decoder(model, blocks, gates, cache, operations, sinks=sinks, evicts=evicts, undo=undo)


def _make_block(layer: Layer, undo: ExitStack) -> Block:
    norms = {"query_norm": layer.query_norm, "key_norm": layer.key_norm}
    return Block(
        attention_norm=Norm(*layer.attention_norm),
        qkv=_product(layer.qkv, undo),
        head_norms={name: Norm(*parts) for name, parts in norms.items() if parts is not None},
        rotation=layer.rotation,
        scale=layer.scale,
        out=_product([layer.out], undo),
        out_norm=_norm(layer.out_norm),
        mlp_norm=Norm(*layer.mlp_norm),
        gate_up=_product(layer.gate_up, undo),
        activation=_ACTIVATIONS[type(layer.activation).__name__],
        down=_product([layer.down], undo),
        down_norm=_norm(layer.down_norm),
    )


def _product(linears: Sequence[Any], undo: ExitStack) -> Product:
    """Return one product for all, or, of weights that a library quantised, one after the other."""
    if not all(map(is_plain, linears)):
        return linears[0] if len(linears) == 1 else partial(_each, linears)
    return partial(functional.linear, weight=one_matrix(linears, undo), bias=one_bias(linears))


def _each(linears: Sequence[nn.Module], x: Tensor) -> Tensor:
    return torch.cat([linear(x) for linear in linears], dim=-1)


def _norm(parts: NormParts | None) -> Norm | None:
    return None if parts is None else Norm(*parts)
