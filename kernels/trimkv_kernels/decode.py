"""Decode in Triton: one pass over the slots for attention and the lowest score, then a merge that evicts in place."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimkv_kernels.casts import narrowed, widened
from trimkv_kernels.launch import decode_launch, padded
from trimkv_kernels.slots import Journal, Slots


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    position: Tensor,
    slots: Slots,
    journal: Journal,
    *,
    fill: int,
    dense: bool,  # noqa: ARG001  # the mask costs nothing here
    scale: float,
    window: int | None,
    recent: int = 0,
    static: bool = False,
    spans: Tensor | None = None,
    sinks: Tensor | None = None,
    evict: bool = True,
) -> Tensor:
    """Do what `reference.decode` does; K and V are read once."""
    what: dict[str, Any] = {"scale": scale, "window": window, "recent": recent, "static": static}
    what |= {"spans": spans, "sinks": sinks, "evict": evict}
    return _decode(query, key, value, position, slots, fill=fill, log_beta=log_beta, journal=journal, **what)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    slots: Slots,
    *,
    lowest: Tensor | None = None,
    loser: Tensor | None = None,
    scale: float,
    window: int | None,
    recent: int = 0,
    static: bool = False,
    spans: Tensor | None = None,
) -> Tensor:
    """Do what `step_reference.attend` does: the first half of a decode, whose other half `step.evict` is."""
    what: dict[str, Any] = {"scale": scale, "window": window, "recent": recent, "static": static, "spans": spans}
    if lowest is None or loser is None:
        what["evict"] = False
    else:
        what["found"] = lowest, loser
    return _decode(query, key, value, position, slots, fill=slots.position.shape[2], **what)


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    slots: Slots,
    *,
    fill: int,
    scale: float,
    window: int | None,
    recent: int,
    static: bool,
    spans: Tensor | None,
    sinks: Tensor | None = None,
    log_beta: Tensor | None = None,
    journal: Journal | None = None,
    found: tuple[Tensor, Tensor] | None = None,
    evict: bool = True,
) -> Tensor:
    """Attend, and evict; where a loser and its score are to be `found`, write these and leave the slots as they are."""
    batch, num_heads, head_dim = query.shape
    num_kv_heads, size = slots.position.shape[1:]
    span, groups = min(fill + 1, size), num_heads // num_kv_heads
    programs = batch * num_kv_heads
    launch = decode_launch(programs=programs, size=size, head_dim=head_dim, element_size=query.element_size())
    tile, wide = padded(groups), padded(head_dim)
    part_acc = query.new_empty(programs, launch.splits, tile, wide, dtype=torch.float32)
    part_stats = query.new_empty(programs, launch.splits, 2, tile, dtype=torch.float32)
    part_score = query.new_empty(programs, launch.splits, dtype=torch.float32)
    part_loser = query.new_empty(programs, launch.splits, 2, dtype=torch.int32)
    query, key, value, position = (tensor.contiguous() for tensor in (query, key, value, position))
    spans = None if spans is None else spans.contiguous()
    output = torch.empty_like(query)
    shape = {"HEADS": num_kv_heads, "GROUPS": groups, "TILE": tile, "DIM": head_dim, "WIDE": wide, "EVICT": evict}
    ranks = {"RECENT": recent, "STATIC": static}
    _scan[(programs, launch.splits)](
        query,
        *slots,
        position,
        part_acc,
        part_stats,
        part_score,
        part_loser,
        spans,
        size,
        span,
        scale,
        SPLIT_SLOTS=launch.split_slots,
        BLOCK=launch.block,
        WINDOW=window or 0,
        num_warps=launch.warps,
        **ranks,
        **shape,
    )
    _merge[(programs,)](
        query,
        key,
        value,
        None if log_beta is None else log_beta.contiguous(),
        *slots,
        *((None,) * 5 if journal is None else journal),
        *(found or (None, None)),
        position,
        part_acc,
        part_stats,
        part_score,
        part_loser,
        None if sinks is None else sinks.contiguous(),
        spans,
        output,
        size,
        scale,
        SPLITS=launch.splits,
        num_warps=launch.warps,
        **ranks,
        **shape,
    )
    return output


@triton.jit(do_not_specialize=["size", "span"])
def _scan(
    query,
    slot_key,
    slot_value,
    slot_log_beta,
    slot_position,
    position,
    part_acc,
    part_stats,
    part_score,
    part_loser,
    spans,
    size,
    span,
    scale,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    EVICT: tl.constexpr,
    SPLIT_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    RECENT: tl.constexpr,
    STATIC: tl.constexpr,
):
    """Scan one split of the slots of one (row, KV head): online softmax for its query heads, and who would lose."""
    program, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    now = tl.load(position + program // HEADS)
    group, dim = tl.arange(0, TILE), tl.arange(0, WIDE)
    inside = (group < GROUPS)[:, None] & (dim < DIM)[None, :]
    tokens = tl.load(query + (program * GROUPS + group[:, None]) * DIM + dim[None, :], mask=inside, other=0.0)
    highest = tl.full([TILE], -1e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, WIDE], tl.float32)
    lowest, loser_position, loser = tl.full([], float("inf"), tl.float32), now * 0 - 2147483647, now * 0
    first = split * SPLIT_SLOTS
    for start in range(first, tl.minimum(first + SPLIT_SLOTS, span), BLOCK):
        slot = start + tl.arange(0, BLOCK)
        there = slot < span
        at = program * size + slot
        held = tl.load(slot_position + at, mask=there, other=-1)
        alive = held >= 0
        if WINDOW > 0:
            alive = alive & (held > now - WINDOW)

        keep = alive[:, None] & (dim < DIM)[None, :]
        keys = tl.load(slot_key + at[:, None] * DIM + dim[None, :], mask=keep, other=0.0)
        keys = widened(keys, tokens)
        logits = tl.dot(tokens.to(keys.dtype), tl.trans(keys), input_precision="ieee") * scale
        logits = tl.where(alive[None, :], logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp(logits - higher[:, None])
        shrink = tl.exp(highest - higher)
        values = tl.load(slot_value + at[:, None] * DIM + dim[None, :], mask=keep, other=0.0)
        values = widened(values, tokens)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        highest = higher

        if EVICT:
            score = tl.load(slot_log_beta + at, mask=there, other=0.0)
            if not STATIC:
                score = score * (now + 2 - held).to(tl.float32)
            if RECENT > 0:
                score = tl.where((held >= 0) & (held > now - RECENT), float("inf"), score)
            if spans is not None:
                score = tl.where(_protected(held, spans + program // HEADS * 4), float("inf"), score)
            if WINDOW > 0:
                score = tl.where(held > now - WINDOW, score, -float("inf"))
            score = tl.where(there, score, float("inf"))
            low = tl.min(score, 0)
            newest = tl.max(tl.where(score == low, held, -2147483647), 0)  # ties: the newest goes
            where = tl.max(tl.where((score == low) & (held == newest), slot, -1), 0)
            worse = (low < lowest) | ((low == lowest) & (newest > loser_position))
            loser_position = tl.where(worse, newest, loser_position)
            loser = tl.where(worse, where, loser)
            lowest = tl.minimum(low, lowest)
    part = program * tl.num_programs(1) + split
    tl.store(part_acc + (part * TILE + group[:, None]) * WIDE + dim[None, :], acc)
    tl.store(part_stats + part * 2 * TILE + group, highest)
    tl.store(part_stats + (part * 2 + 1) * TILE + group, total)
    tl.store(part_score + part, lowest)
    tl.store(part_loser + part * 2, loser)
    tl.store(part_loser + part * 2 + 1, loser_position)


@triton.jit
def _protected(held, spans):
    """Tell which positions lie in one of a row's two intervals."""
    first = (held >= tl.load(spans)) & (held < tl.load(spans + 1))
    second = (held >= tl.load(spans + 2)) & (held < tl.load(spans + 3))
    return (held >= 0) & (first | second)


@triton.jit(do_not_specialize=["size"])
def _merge(
    query,
    key,
    value,
    log_beta,
    slot_key,
    slot_value,
    slot_log_beta,
    slot_position,
    journal_key,
    journal_value,
    journal_log_beta,
    journal_position,
    journal_slot,
    found_lowest,
    found_loser,
    position,
    part_acc,
    part_stats,
    part_score,
    part_loser,
    sinks,
    spans,
    output,
    size,
    scale,
    SPLITS: tl.constexpr,
    RECENT: tl.constexpr,
    STATIC: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Join the splits with the new token of one (row, KV head), write the output, swap the loser's slot out."""
    program = tl.program_id(0).to(tl.int64)
    now = tl.load(position + program // HEADS)
    group, dim = tl.arange(0, TILE), tl.arange(0, WIDE)
    inside = (group < GROUPS)[:, None] & (dim < DIM)[None, :]
    at = (program * GROUPS + group[:, None]) * DIM + dim[None, :]
    tokens = tl.load(query + at, mask=inside, other=0.0).to(tl.float32)
    new_key = tl.load(key + program * DIM + dim, mask=dim < DIM, other=0.0)
    new_value = tl.load(value + program * DIM + dim, mask=dim < DIM, other=0.0)
    highest = tl.sum(tokens * new_key.to(tl.float32)[None, :], 1) * scale
    total = tl.full([TILE], 1.0, tl.float32)
    acc = tl.zeros([TILE, WIDE], tl.float32) + new_value.to(tl.float32)[None, :]
    if sinks is not None:
        place = (program % HEADS) * GROUPS + group
        sink = tl.load(sinks + place, mask=group < GROUPS, other=0.0).to(tl.float32)
        higher = tl.maximum(highest, sink)
        own = tl.exp(highest - higher)
        total, acc = own + tl.exp(sink - higher), acc * own[:, None]
        highest = higher
    lowest, loser_position, loser = tl.full([], float("inf"), tl.float32), now * 0 - 2147483647, now * 0
    for split in range(SPLITS):
        part = program * SPLITS + split
        part_highest = tl.load(part_stats + part * 2 * TILE + group)
        part_total = tl.load(part_stats + (part * 2 + 1) * TILE + group)
        higher = tl.maximum(highest, part_highest)
        shrink, part_shrink = tl.exp(highest - higher), tl.exp(part_highest - higher)
        part_sum = tl.load(part_acc + (part * TILE + group[:, None]) * WIDE + dim[None, :])
        acc = acc * shrink[:, None] + part_sum * part_shrink[:, None]
        total = total * shrink + part_total * part_shrink
        highest = higher
        low, newest = tl.load(part_score + part), tl.load(part_loser + part * 2 + 1)
        worse = (low < lowest) | ((low == lowest) & (newest > loser_position))
        loser_position = tl.where(worse, newest, loser_position)
        loser = tl.where(worse, tl.load(part_loser + part * 2), loser)
        lowest = tl.minimum(low, lowest)
    tl.store(output + at, (acc / total[:, None]).to(output.dtype.element_ty), mask=inside)

    if found_lowest is not None:
        tl.store(found_lowest + program, lowest)
        tl.store(found_loser + program, loser)
    elif EVICT:
        new_log_beta = tl.load(log_beta + program)
        slots = slot_key, slot_value, slot_log_beta, slot_position
        journal = journal_key, journal_value, journal_log_beta, journal_position, journal_slot
        intervals = spans
        if spans is not None:
            intervals = spans + program // HEADS * 4
        enter(
            new_key, new_value, new_log_beta, now, lowest, loser, slots, journal, intervals, program, size, dim,
            DIM, RECENT, STATIC,
        )  # fmt: skip


@triton.jit
def enter(
    new_key,
    new_value,
    new_log_beta,
    now,
    lowest,
    loser,
    slots,
    journal,
    intervals,
    program,
    size,
    dim,
    DIM: tl.constexpr,
    RECENT: tl.constexpr,
    STATIC: tl.constexpr,
):
    """Write what the loser's slot of one (row, KV head) holds to the journal, and the new token there if it wins."""
    slot_key, slot_value, slot_log_beta, slot_position = slots
    journal_key, journal_value, journal_log_beta, journal_position, journal_slot = journal
    own = new_log_beta
    if not STATIC:
        own = 2.0 * new_log_beta
    if intervals is not None:
        own = tl.where(_protected(now, intervals), float("inf"), own)
    enters = (now >= 0) & (own > lowest)
    if RECENT > 0:
        enters = now >= 0
    slot = program * size + loser
    wide = dim < DIM
    tl.store(journal_slot + program, loser.to(tl.int64))
    tl.store(journal_position + program, tl.load(slot_position + slot))
    tl.store(journal_log_beta + program, tl.load(slot_log_beta + slot))
    tl.store(journal_key + program * DIM + dim, tl.load(slot_key + slot * DIM + dim, mask=wide), mask=wide)
    tl.store(journal_value + program * DIM + dim, tl.load(slot_value + slot * DIM + dim, mask=wide), mask=wide)
    tl.store(slot_position + slot, now, mask=enters)
    tl.store(slot_log_beta + slot, new_log_beta, mask=enters)
    tl.store(slot_key + slot * DIM + dim, narrowed(new_key, slot_key.dtype.element_ty), mask=enters & wide)
    tl.store(slot_value + slot * DIM + dim, narrowed(new_value, slot_value.dtype.element_ty), mask=enters & wide)
