"""Prefill in Triton: a chunk attends to the slots and to itself; then its survivors move into the losers' slots."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimkv_kernels.casts import narrowed, widened
from trimkv_kernels.launch import Chip, padded, prefill_launch
from trimkv_kernels.ranking import survivors
from trimkv_kernels.slots import Slots


def prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    positions: Tensor,
    slots: Slots,
    *,
    rows: Tensor,
    fill: int,
    scale: float,
    window: int | None,
    recent: int = 0,
    static: bool = False,
    spans: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Do what `reference.prefill` does; the slots are read where they lie, and only survivors are written."""
    batch, num_heads, length, head_dim = query.shape
    num_kv_heads, size = slots.position.shape[1:]
    groups = num_heads // num_kv_heads
    how: dict[str, int] = {"queries": length * groups, "head_dim": head_dim, "element_size": query.element_size()}
    launch = prefill_launch(**how, chip=Chip.of(query.device))
    query, key, value, log_beta, positions, rows = (
        tensor.contiguous() for tensor in (query, key, value, log_beta, positions, rows)
    )
    output = torch.empty_like(query)
    _attend[(triton.cdiv(length * groups, launch.queries), batch * num_kv_heads)](
        query,
        key,
        value,
        positions,
        slots.key,
        slots.value,
        slots.position,
        rows,
        None if sinks is None else sinks.contiguous(),
        output,
        size,
        fill,
        length,
        scale,
        HEADS=num_kv_heads,
        GROUPS=groups,
        QUERIES=launch.queries,
        KEYS=launch.keys,
        DIM=head_dim,
        WIDE=padded(head_dim),
        WINDOW=window or 0,
        num_warps=launch.warps,
    )
    ranks: dict[str, Any] = {"window": window, "recent": recent, "static": static, "spans": spans}
    order, vacant = survivors(log_beta, positions, slots, rows=rows, fill=fill, **ranks)
    _move[(length, batch * num_kv_heads)](  # a grid's first axis alone goes beyond 65,535
        key, value, log_beta, positions, *slots, rows, order, vacant, size, length, HEADS=num_kv_heads, DIM=head_dim,
        WIDE=padded(head_dim), num_warps=1,
    )  # fmt: skip
    return output


@triton.jit(do_not_specialize=["size", "fill", "length"])
def _attend(
    query,
    key,
    value,
    positions,
    slot_key,
    slot_value,
    slot_position,
    rows,
    sinks,
    output,
    size,
    fill,
    length,
    scale,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Attend from a tile of queries of one (row, KV head): first to the slots, then to the chunk up to the tile.

    A tile holds tokens one after the other, each with its `GROUPS` query heads: short chunks, too, fill one.
    """
    tile, program = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, kv_head = program // HEADS, program % HEADS
    place, dim = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, WIDE)
    token, head = place // GROUPS, program * GROUPS + place % GROUPS
    now = tl.load(positions + row * length + token, mask=token < length, other=-1)
    mine = (now >= 0)[:, None] & (dim < DIM)[None, :]
    at = (head * length + token)[:, None] * DIM + dim[None, :]
    tokens = tl.load(query + at, mask=mine, other=0.0)
    highest = tl.full([QUERIES], -1e30, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, WIDE], tl.float32)
    if sinks is not None:
        highest = tl.load(sinks + head % (HEADS * GROUPS)).to(tl.float32)
        total += 1.0

    kept = (tl.load(rows + row) * HEADS + kv_head) * size
    for start in range(0, fill, KEYS):
        highest, total, acc = _add_tile(
            tokens, now, slot_position + kept, slot_key + kept * DIM, slot_value + kept * DIM, start, fill,
            highest, total, acc, scale, KEYS, DIM, WIDE, WINDOW, False,
        )  # fmt: skip
    chunk = program * length * DIM
    newer = tl.minimum(((tile + 1) * QUERIES - 1) // GROUPS + 1, length)
    for start in range(0, newer, KEYS):
        highest, total, acc = _add_tile(
            tokens, now, positions + row * length, key + chunk, value + chunk, start, length,
            highest, total, acc, scale, KEYS, DIM, WIDE, WINDOW, True,
        )  # fmt: skip
    result = tl.where(mine, acc / tl.where(total > 0, total, 1.0)[:, None], 0.0)
    inside = (token < length)[:, None] & (dim < DIM)[None, :]
    tl.store(output + at, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _add_tile(
    tokens, now, positions, keys_at, values_at, start, end, highest, total, acc, scale,
    KEYS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, WINDOW: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys from `start` on to the online softmax of queries at positions `now`.

    Slots are loaded without a look at what they hold, so that a tile is on its way while the one before is computed.
    """
    place, dim = start + tl.arange(0, KEYS), tl.arange(0, WIDE)
    there = place < end
    keep = there[:, None] & (dim < DIM)[None, :]
    at = place[:, None] * DIM + dim[None, :]  # within one head: 32 bits are enough, and spare registers
    held = tl.load(positions + place, mask=there, other=-1)
    keys = widened(tl.load(keys_at + at, mask=keep, other=0.0), tokens)
    logits = tl.dot(tokens.to(keys.dtype), tl.trans(keys), input_precision="ieee") * scale
    since = tl.where(held >= 0, held, 2147483647)  # no token is newer than every query
    seen = since[None, :] <= now[:, None]
    if WINDOW > 0:
        seen = seen & (held[None, :] > now[:, None] - WINDOW)
    logits = tl.where(seen, logits, -float("inf"))
    higher = tl.maximum(highest, tl.max(logits, 1))
    weights = tl.exp(logits - higher[:, None])
    shrink = tl.exp(highest - higher)
    if PADDED:  # what a model makes of padding may be no number
        keep = keep & (held >= 0)[:, None]
    values = widened(tl.load(values_at + at, mask=keep, other=0.0), tokens)
    acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return higher, total * shrink + tl.sum(weights, 1), acc


@triton.jit(do_not_specialize=["size", "length"])
def _move(
    key,
    value,
    log_beta,
    positions,
    slot_key,
    slot_value,
    slot_log_beta,
    slot_position,
    rows,
    order,
    vacant,
    size,
    length,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write one token of the chunk into the slot that it takes in one (row, KV head), if any."""
    token, program = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = program // HEADS
    source = program * length + token
    number = tl.load(order + source)
    survives = number >= 0
    slot = tl.load(vacant + program * length + number, mask=survives, other=0)
    place = (tl.load(rows + row) * HEADS + program % HEADS) * size + slot
    tl.store(slot_position + place, tl.load(positions + row * length + token), mask=survives)
    tl.store(slot_log_beta + place, tl.load(log_beta + source), mask=survives)
    dim = tl.arange(0, WIDE)
    wide = survives & (dim < DIM)
    new_key = tl.load(key + source * DIM + dim, mask=wide, other=0.0)
    new_value = tl.load(value + source * DIM + dim, mask=wide, other=0.0)
    tl.store(slot_key + place * DIM + dim, narrowed(new_key, slot_key.dtype.element_ty), mask=wide)
    tl.store(slot_value + place * DIM + dim, narrowed(new_value, slot_value.dtype.element_ty), mask=wide)
