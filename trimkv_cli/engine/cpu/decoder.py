"""Decode steps on a CPU, one token per row, with little between their operations.

The forward of transformers serves any model and any number of tokens, and its modules cost more Python than a small
model costs arithmetic. Here the same numbers come out of the same weights, of the families whose layers are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimkv_cli.cache.releases import frequencies
from trimkv_cli.cache.retention_cache import RetentionCache
from trimkv_cli.engine.cpu.blocks import (
    WORTH_WAKING,
    Block,
    Norm,
    make_blocks,
    make_norm,
    pack,
    packing_pays,
    project,
)
from trimkv_cli.engine.cpu.graphs import Graphs
from trimkv_cli.engine.devices import on_threads, tidy_heap
from trimkv_cli.engine.together import GatesTogether

_NO_MASK = torch.empty(0)


class Decoder:
    """Own the blocks of a model, for decode steps over one cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[Block],
        gates: Sequence[nn.Module],
        cache: RetentionCache,
        *,
        sinks: int,
        evicts: bool,
        undo: ExitStack,
    ) -> None:
        decoder: Any = model.get_decoder()
        self._blocks = blocks
        self._gates = GatesTogether(gates, undo)
        self._sinks = sinks  # the first tokens of a sequence, which are pinned
        self._pools = list(cache.pools.values())
        self._places = [
            (self._pools.index(pool), place) for pool, place in (layer.pool for layer in cache.layers if layer.pool)
        ]
        self._layers = [
            [i for i, (pool, _) in enumerate(self._places) if pool == owner] for owner in range(len(self._pools))
        ]
        self._embed = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._rotations = sorted({block.rotation for block in blocks}, key=str)
        self._norm = make_norm(decoder.norm)
        self._head = project([model.get_output_embeddings()], undo)
        self._widest = max(block.gate_up.numel for block in blocks)
        self._evicts = evicts
        self._layers_of_step = Graphs(self._through)
        undo.callback(self.forget)

    def forget(self) -> None:
        """Let go of where slots and weights lie, before they move."""
        self._layers_of_step.forget()

    def step(
        self,
        ids: Tensor,
        position: Tensor,
        *,
        dense: bool,
        shown: Tensor | None = None,
        spans: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Feed `ids` `[B]` at `position` `[B]` int32 to the first B rows, and keep the best M of each head.

        A row at −1 has no token: its slots stay as they are. `dense`: every row with a token has all its slots in use.
        `shown` `[B]` are the positions that the model sees, when they are others; what lies in `spans` `[B, 2, 2]`
        int32 is protected.

        Returns:
            The logits `[B, V]`, and log_beta `[L, B, Hkv]` of the tokens.
        """
        # Threads sleep between steps, and one does small products sooner than others wake.
        with on_threads(None if len(ids) * self._widest >= WORTH_WAKING else 1):
            return self._step(ids, position, dense=dense, shown=shown, spans=spans)

    def _step(
        self, ids: Tensor, position: Tensor, *, dense: bool, shown: Tensor | None, spans: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        biases = [pool.begin(position, dense=dense) for pool in self._pools]
        angles = (position if shown is None else shown).clamp(min=0)[:, None, None].float()
        rotations = [each for kind in self._rotations for each in self._rotation(angles, kind)]
        masks = [_NO_MASK if bias is None else bias for bias in biases]
        held = [each for pool in self._pools for each in pool.held]
        x, entering = self._layers_of_step(self._embed(ids), *rotations, *masks, *held)
        log_beta = self._gates(entering, position)
        ranked = log_beta.masked_fill((position < self._sinks)[:, None], torch.inf) if self._sinks else log_beta
        for owner, layers in enumerate(self._layers if self._evicts else ()):
            self._pools[owner].evict(ranked if len(self._pools) == 1 else ranked[layers], position, spans)
        return self._head(self._norm(x)), log_beta

    def _through(self, x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        """Send tokens `[B, hidden]` through all layers; rotations, masks and slots are given, for a graph of it.

        Returns:
            Hidden states, and what gates read, `[L, B, input]`.
        """
        kinds, pools = len(self._rotations), len(self._pools)
        rotations = {kind: (others[2 * i], others[2 * i + 1]) for i, kind in enumerate(self._rotations)}
        biases = [mask if mask.numel() else None for mask in others[2 * kinds : 2 * kinds + pools]]
        slots = others[2 * kinds + pools :]
        x, entering = x.clone(), []
        for block, (pool, place) in zip(self._blocks, self._places, strict=True):
            hidden = block.attention_norm(x)
            query, key, value = _project(block, hidden, *rotations[block.rotation], self._pools[pool].key.shape[2])
            entering.append(torch.cat((key.flatten(1), value.flatten(1)), dim=1) if self._gates.read_kv else hidden)
            held = slots[2 * pool], slots[2 * pool + 1]
            attended = self._pools[pool].attend(place, query, key, value, biases[pool], held=held, scale=block.scale)
            x = x.add_(_normed(block.out(attended.flatten(1)), block.out_norm))
            gate, up = block.gate_up(block.mlp_norm(x)).chunk(2, dim=-1)
            x = x.add_(_normed(block.down(block.activation(gate).mul_(up)), block.down_norm))
        return x, torch.stack(entering)

    def _rotation(self, position: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        """Return cos and signed sin, `[B, 1, D]`: x · cos + roll(x, D / 2) · sin rotates x."""
        inv_freq, scaling = frequencies(self._rotary, kind)
        angles = position * inv_freq
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _normed(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else norm(x.float())


def make_decoder(
    model: PreTrainedModel,
    gates: Sequence[nn.Module],
    cache: RetentionCache,
    *,
    rows: int,
    sinks: int,
    evicts: bool,
    undo: ExitStack,
) -> Decoder | None:
    """Return a decoder for the model, or None when its form, or the cache's, is not one known here.

    For `rows` sequences or more that make it worth it, the model's layers are packed, whatever its form. `undo` gives
    model and gates back as they were.
    """
    if packing_pays(model, rows=rows):
        with tidy_heap():
            pack(model, undo)
    known = model.device.type == "cpu" and model.dtype == cache.layers[0].slots.key.dtype == torch.float32
    blocks = make_blocks(model, undo) if known else None
    return None if blocks is None else Decoder(model, blocks, gates, cache, sinks=sinks, evicts=evicts, undo=undo)


def _project(
    block: Block, hidden: Tensor, cos: Tensor, sin: Tensor, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query `[B, Hq, D]` and key, rotated, and value, `[B, Hkv, D]`."""
    heads = block.qkv(hidden).float().view(len(hidden), -1, cos.shape[-1])
    rotated, value = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    if block.head_norm is not None:
        rotated = block.head_norm(rotated)
    rotated = torch.addcmul(rotated * cos, rotated.roll(cos.shape[-1] // 2, dims=-1), sin)
    return rotated[:, :-num_kv_heads], rotated[:, -num_kv_heads:], value
