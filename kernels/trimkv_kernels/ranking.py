"""Which of a chunk's tokens and of the slots' survive, ranked by one kernel a layer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimkv_kernels.decode import score_of
from trimkv_kernels.slots import Slots

_BLOCK = 1024  # candidates that are ranked at a time


def survivors(
    log_beta: Tensor,
    positions: Tensor,
    slots: Slots,
    *,
    rows: Tensor,
    fill: int,
    window: int | None,
    recent: int = 0,
    static: bool = False,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose as `reference.survivors` does, from contiguous tensors.

    Returns:
        `[B, Hkv, T]` int32 each: which of the survivors each token of the chunk is, or −1, and the slot that each of
        the survivors takes.
    """
    batch, heads, length = log_beta.shape
    size = slots.position.shape[2]
    order, vacant = torch.empty(2, batch, heads, length, dtype=torch.int32, device=log_beta.device)
    _rank[(batch * heads,)](
        log_beta,
        positions,
        slots.log_beta,
        slots.position,
        rows,
        None if spans is None else spans.contiguous(),
        order,
        vacant,
        size,
        min(fill + length, size),
        length,
        HEADS=heads,
        WINDOW=window or 0,
        RECENT=recent,
        STATIC=static,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return order, vacant


@triton.jit(do_not_specialize=["size", "span", "length"])
def _rank(
    log_beta,
    positions,
    slot_log_beta,
    slot_position,
    rows,
    spans,
    order,
    vacant,
    size,
    span,
    length,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    RECENT: tl.constexpr,
    STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the rank from which on one (row, KV head) loses, digit by digit, and number what changes its place.

    As many lose as the chunk has tokens. A rank has 64 bits, the first of which is its sign.
    """
    program = tl.program_id(0).to(tl.int64)
    row, place = program // HEADS, tl.arange(0, BLOCK)
    chunk, held = program * length, (tl.load(rows + row) * HEADS + program % HEADS) * size
    held_log_beta, held_position = slot_log_beta + held, slot_position + held
    new_log_beta, new_position = log_beta + chunk, positions + row * length
    intervals = spans
    if spans is not None:
        intervals = spans + row * 4
    now = tl.full([], -1, tl.int32)
    for start in range(0, length, BLOCK):
        new = tl.load(new_position + start + place, mask=start + place < length, other=-1)
        now = tl.maximum(now, tl.max(new, 0))

    cut, known, left = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64), length
    shift = tl.full([], 56, tl.int32)
    while shift >= 0:
        sign = tl.where(shift == 56, 128, 0)
        counts = tl.zeros([256], tl.int32)
        for start in range(0, span, BLOCK):
            slot = start + place
            rank = _rank_of(held_log_beta, held_position, slot, span, now, intervals, WINDOW, RECENT, STATIC, False)
            value = ((rank >> shift) & 255).to(tl.int32) ^ sign
            counts += tl.histogram(value, 256, mask=(slot < span) & ((rank & known) == cut))
        for start in range(0, length, BLOCK):
            token = start + place
            rank = _rank_of(new_log_beta, new_position, token, length, now, intervals, WINDOW, RECENT, STATIC, True)
            value = ((rank >> shift) & 255).to(tl.int32) ^ sign
            counts += tl.histogram(value, 256, mask=(token < length) & ((rank & known) == cut))
        above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
        here = (above < left) & (left <= above + counts)
        value = tl.sum(tl.where(here, tl.arange(0, 256), 0), 0) ^ sign
        left -= tl.sum(tl.where(here, above, 0), 0)
        cut = cut | (value.to(tl.int64) << shift)
        known = known | (tl.full([], 255, tl.int64) << shift)
        all_lose = left == tl.sum(tl.where(here, counts, 0), 0)  # of those that begin as the cut does
        shift = tl.where(all_lose, -1, shift - 8)

    count = tl.full([], 0, tl.int32)
    for start in range(0, span, BLOCK):
        slot = start + place
        rank = _rank_of(held_log_beta, held_position, slot, span, now, intervals, WINDOW, RECENT, STATIC, False)
        loses = ((slot < span) & (rank >= cut)).to(tl.int32)
        tl.store(vacant + chunk + count + tl.cumsum(loses, 0) - 1, slot, mask=loses > 0)
        count += tl.sum(loses, 0)
    count = tl.full([], 0, tl.int32)
    for start in range(0, length, BLOCK):
        token = start + place
        rank = _rank_of(new_log_beta, new_position, token, length, now, intervals, WINDOW, RECENT, STATIC, True)
        survives = ((token < length) & (rank < cut)).to(tl.int32)
        number = tl.where(survives > 0, count + tl.cumsum(survives, 0) - 1, -1)
        tl.store(order + chunk + token, number, mask=token < length)
        count += tl.sum(survives, 0)


@triton.jit
def _rank_of(
    log_betas, positions, place, count, now, intervals,
    WINDOW: tl.constexpr, RECENT: tl.constexpr, STATIC: tl.constexpr, NEW: tl.constexpr,
):  # fmt: skip
    """Return what `reference` ranks by: the bits of the score, the highest first, and the position; padding is last."""
    position = tl.load(positions + place, mask=place < count, other=-1)
    score = tl.load(log_betas + place, mask=place < count, other=0.0)
    score = score_of(score, position, now, intervals, WINDOW, RECENT, STATIC)
    score = tl.where(score != score, -3.4028234663852886e38, score)  # noqa: PLR0124  # no number is the least one
    score = tl.where(score == 0.0, 0.0, score)  # there is one zero
    bits = score.to(tl.int32, bitcast=True)
    descending = ~tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    rank = (descending.to(tl.int64) << 32) + position.to(tl.int64) + 2147483648
    if NEW:
        rank = tl.where(position < 0, 9223372036854775807, rank)
    return rank
