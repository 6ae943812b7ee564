"""Decode in Triton: one pass over the slots for attention and the lowest score, then a merge that evicts in place."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimkv_kernels.casts import narrowed, widened
from trimkv_kernels.launch import MOST_SPLITS, Chip, decode_launch, padded
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
    groups, programs = num_heads // num_kv_heads, batch * num_kv_heads
    how: dict[str, int] = {"programs": programs, "size": size, "head_dim": head_dim}
    launch = decode_launch(**how, element_size=query.element_size(), chip=Chip.of(query.device))
    part_sum = query.new_empty(batch * num_heads, launch.splits, head_dim, dtype=torch.float32)
    part_stats = query.new_empty(batch * num_heads, 2, launch.splits, dtype=torch.float32)
    part_score = query.new_empty(programs, launch.splits, dtype=torch.float32)
    part_loser = query.new_empty(programs, 2, launch.splits, dtype=torch.int32)
    parts = part_sum, part_stats, part_score, part_loser
    query, key, value, position = (tensor.contiguous() for tensor in (query, key, value, position))
    spans = None if spans is None else spans.contiguous()
    output = torch.empty_like(query)
    shape = {"HEADS": num_kv_heads, "GROUPS": groups, "DIM": head_dim, "WIDE": padded(head_dim), "EVICT": evict}
    ranks = {"RECENT": recent, "STATIC": static}
    _scan[(programs, launch.splits)](
        query,
        *slots,
        position,
        *parts,
        spans,
        size,
        min(fill + 1, size),
        launch.split_slots,
        scale,
        TILE=padded(groups),
        BLOCK=launch.block,
        WINDOW=window or 0,
        num_warps=launch.warps,
        **ranks,
        **shape,
    )
    _merge[(batch * num_heads,)](
        query,
        key,
        value,
        None if log_beta is None else log_beta.contiguous(),
        *slots,
        *((None,) * 5 if journal is None else journal),
        *(found or (None, None)),
        position,
        *parts,
        None if sinks is None else sinks.contiguous(),
        spans,
        output,
        size,
        launch.splits,
        scale,
        SPLITS=MOST_SPLITS,
        num_warps=launch.merge_warps,
        **ranks,
        **shape,
    )
    return output


@triton.jit(do_not_specialize=["size", "span", "split_slots"])
def _scan(
    query,
    slot_key,
    slot_value,
    slot_log_beta,
    slot_position,
    position,
    part_sum,
    part_stats,
    part_score,
    part_loser,
    spans,
    size,
    span,
    split_slots,
    scale,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    EVICT: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    RECENT: tl.constexpr,
    STATIC: tl.constexpr,
):
    """Scan one split of the slots of one (row, KV head): online softmax for its query heads, and who would lose.

    What is loaded depends on nothing that was loaded, so that a block is on its way while the one before is computed.
    """
    program, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row = program // HEADS
    now = tl.load(position + row)
    group, dim = tl.arange(0, TILE), tl.arange(0, WIDE)
    inside = (group < GROUPS)[:, None] & (dim < DIM)[None, :]
    tokens = tl.load(query + (program * GROUPS + group[:, None]) * DIM + dim[None, :], mask=inside, other=0.0)
    highest = tl.full([TILE], -1e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, WIDE], tl.float32)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    newest = tl.full([BLOCK], -2147483647, tl.int32)
    loser = tl.zeros([BLOCK], tl.int32)
    first = split * split_slots
    for start in range(first, tl.minimum(first + split_slots, span), BLOCK):
        slot = start + tl.arange(0, BLOCK)
        there = slot < span
        at = program * size + slot
        held = tl.load(slot_position + at, mask=there, other=-1)
        alive = held >= 0
        if WINDOW > 0:
            alive = alive & (held > now - WINDOW)

        keep = there[:, None] & (dim < DIM)[None, :]
        keys = widened(tl.load(slot_key + at[:, None] * DIM + dim[None, :], mask=keep, other=0.0), tokens)
        logits = tl.dot(tokens.to(keys.dtype), tl.trans(keys), input_precision="ieee") * scale
        logits = tl.where(alive[None, :], logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp(logits - higher[:, None])
        shrink = tl.exp(highest - higher)
        values = widened(tl.load(slot_value + at[:, None] * DIM + dim[None, :], mask=keep, other=0.0), tokens)
        acc = acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        highest = higher

        if EVICT:
            intervals = spans
            if spans is not None:
                intervals = spans + row * 4
            score = tl.load(slot_log_beta + at, mask=there, other=0.0)
            score = tl.where(there, score_of(score, held, now, intervals, WINDOW, RECENT, STATIC), float("inf"))
            worse = (score < lowest) | ((score == lowest) & (held > newest))
            newest = tl.where(worse, held, newest)
            loser = tl.where(worse, slot, loser)
            lowest = tl.where(worse, score, lowest)
    head = program * GROUPS + group
    tl.store(part_sum + (head[:, None] * splits + split) * DIM + dim[None, :], acc, mask=inside)
    tl.store(part_stats + head * 2 * splits + split, highest, mask=group < GROUPS)
    tl.store(part_stats + (head * 2 + 1) * splits + split, total, mask=group < GROUPS)
    if EVICT:
        low, position_of_loser, slot_of_loser = _find_loser(lowest, newest, loser)
        tl.store(part_score + program * splits + split, low)
        tl.store(part_loser + program * 2 * splits + split, slot_of_loser)
        tl.store(part_loser + (program * 2 + 1) * splits + split, position_of_loser)


@triton.jit
def score_of(log_beta, held, now, intervals, WINDOW: tl.constexpr, RECENT: tl.constexpr, STATIC: tl.constexpr):
    """Return what `reference` ranks tokens at positions `held` by."""
    score = log_beta
    if not STATIC:
        score = score * (now + 2 - held).to(tl.float32)
    if RECENT > 0:
        score = tl.where((held >= 0) & (held > now - RECENT), float("inf"), score)
    if intervals is not None:
        score = tl.where(_protected(held, intervals), float("inf"), score)
    if WINDOW > 0:
        score = tl.where(held > now - WINDOW, score, -float("inf"))
    return score


@triton.jit
def _find_loser(score, held, slot):
    """Return the lowest score, and position and slot of who has it: of several the newest."""
    lowest = tl.min(score, 0)
    newest = tl.max(tl.where(score == lowest, held, -2147483647), 0)
    return lowest, newest, tl.max(tl.where((score == lowest) & (held == newest), slot, 0), 0)


@triton.jit
def _protected(held, spans):
    """Tell which positions lie in one of a row's two intervals."""
    first = (held >= tl.load(spans)) & (held < tl.load(spans + 1))
    second = (held >= tl.load(spans + 2)) & (held < tl.load(spans + 3))
    return (held >= 0) & (first | second)


@triton.jit(do_not_specialize=["size", "splits"])
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
    part_sum,
    part_stats,
    part_score,
    part_loser,
    sinks,
    spans,
    output,
    size,
    splits,
    scale,
    SPLITS: tl.constexpr,
    RECENT: tl.constexpr,
    STATIC: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Join the splits with the new token of one query head, write its output; the first of a KV head's evicts there.

    All splits are read at once. `SPLITS` is the most there may be: one kernel serves all numbers of rows and slots.
    """
    head = tl.program_id(0).to(tl.int64)
    program = head // GROUPS
    split, dim = tl.arange(0, SPLITS), tl.arange(0, WIDE)
    there, inside = split < splits, dim < DIM
    sums = part_sum + (head * splits + split[:, None]) * DIM + dim[None, :]
    sums = tl.load(sums, mask=there[:, None] & inside[None, :], other=0.0)
    highest = tl.load(part_stats + head * 2 * splits + split, mask=there, other=-1e30)
    totals = tl.load(part_stats + (head * 2 + 1) * splits + split, mask=there, other=0.0)
    token = tl.load(query + head * DIM + dim, mask=inside, other=0.0)
    new_key = tl.load(key + program * DIM + dim, mask=inside, other=0.0)
    new_value = tl.load(value + program * DIM + dim, mask=inside, other=0.0)
    own = tl.sum(token.to(tl.float32) * new_key.to(tl.float32), 0) * scale
    top = tl.maximum(tl.max(highest, 0), own)
    if sinks is not None:
        sink = tl.load(sinks + head % (HEADS * GROUPS)).to(tl.float32)
        top = tl.maximum(top, sink)
    shrink, own = tl.exp(highest - top), tl.exp(own - top)
    total = tl.sum(totals * shrink, 0) + own
    if sinks is not None:
        total += tl.exp(sink - top)
    result = (tl.sum(sums * shrink[:, None], 0) + own * new_value.to(tl.float32)) / total
    tl.store(output + head * DIM + dim, result.to(output.dtype.element_ty), mask=inside)

    if EVICT:  # noqa: SIM102  this is known when it is compiled, the other when it runs
        if head % GROUPS == 0:
            score = tl.load(part_score + program * splits + split, mask=there, other=float("inf"))
            slot = tl.load(part_loser + program * 2 * splits + split, mask=there, other=0)
            held = tl.load(part_loser + (program * 2 + 1) * splits + split, mask=there, other=-2147483647)
            lowest, _, loser = _find_loser(score, held, slot)
            if found_lowest is not None:
                tl.store(found_lowest + program, lowest)
                tl.store(found_loser + program, loser)
            else:
                slots = slot_key, slot_value, slot_log_beta, slot_position
                journal = journal_key, journal_value, journal_log_beta, journal_position, journal_slot
                intervals = spans
                if spans is not None:
                    intervals = spans + program // HEADS * 4
                new_log_beta, now = tl.load(log_beta + program), tl.load(position + program // HEADS)
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
