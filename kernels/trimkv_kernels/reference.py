"""The operations in plain torch: the definition that every kernel must equal, and what runs on a CPU.

Positions say everything about visibility: a negative position holds no token, a query sees what is not newer than
itself, and in a layer with a sliding window nothing older than the window. Scores are retention.md section 2: log_beta
· age in float32, where the newest token has age 2; of equal scores the older position stays. `static` ones are section
10: log_beta itself is the score, whatever the age, of any sign; one that is no number or −inf counts as the least
number. What `spans` protect has the score +inf for this call; nothing of that is stored.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trimkv_kernels.slots import Journal, Slots, as_bytes, narrowed

_NEVER = torch.iinfo(torch.int32).max


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
    dense: bool,
    scale: float,
    window: int | None,
    recent: int = 0,
    static: bool = False,
    spans: Tensor | None = None,
    sinks: Tensor | None = None,
    evict: bool = True,
) -> Tensor:
    """Attend from one new token per row to the slots and itself, then keep the best M of these M + 1 in place.

    Args:
        query: `[B, Hq, D]`; B rows, which are the first B rows of `slots`.
        key, value: `[B, Hkv, D]` of the new token.
        log_beta: `[B, Hkv]` float32.
        position: `[B]` int32; −1 marks a row without a token: its slots stay as they are, its output is unspecified.
        slots: changed in place: the loser's slot is overwritten.
        journal: takes what that slot held, so that the step can be undone.
        fill: no row has a token beyond its first `fill` slots.
        dense: every row with a token has all of its first `fill` slots in use.
        window: length of a sliding window, the query itself counted.
        recent: the newest tokens of each row, this one counted, that are pinned.
        static: log_beta is the score, a number as `finite` makes them, or +inf where a token is pinned.
        spans: `[B, 2, 2]` int32, the half-open intervals of positions of each row that are protected; one that ends
            where it begins, or before, holds nothing.
        sinks: `[Hq]`, one more logit in each head's softmax, which has no value (gpt-oss); any float dtype.
        evict: false leaves the slots as they are, only to measure what scoring and eviction cost.

    Returns:
        `[B, Hq, D]`.
    """
    rows, undo = slots.rows(0, query.shape[0]), journal.rows(0, query.shape[0])
    how: dict[str, Any] = {"dense": dense, "scale": scale, "window": window, "sinks": sinks}
    output = attend_one(query, key, value, position, rows.head(fill), **how)
    if evict:
        candidates = rows.head(min(fill + 1, rows.position.shape[2]))
        ranks: dict[str, Any] = {"window": window, "recent": recent, "static": static, "spans": spans}
        _evict_one(key, value, log_beta, position, candidates, undo, **ranks)
    return output


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
    """Attend from a chunk per row to the slots and, causally, to the chunk; then keep the best M of both in place.

    Args:
        query: `[B, Hq, T, D]`.
        key, value: `[B, Hkv, T, D]`.
        log_beta: `[B, Hkv, T]` float32.
        positions: `[B, T]` int32; −1 is padding, on whichever side. The output of padding is zero.
        slots: changed in place: survivors of the chunk overwrite the losers' slots, nothing else moves.
        rows: `[B]` int64, the row of `slots` for each row of the batch.
        fill: no row has a token beyond its first `fill` slots.
        window: length of a sliding window, the query itself counted.
        recent: the newest tokens of each row that are pinned.
        static, spans, sinks: as `decode` takes them.

    Returns:
        `[B, Hq, T, D]`.
    """
    how: dict[str, Any] = {"rows": rows, "fill": fill, "scale": scale, "window": window, "sinks": sinks}
    output = _attend_chunk(query, key, value, positions, slots, **how)
    ranks: dict[str, Any] = {"window": window, "recent": recent, "static": static, "spans": spans}
    _evict_chunk(key, value, log_beta, positions, slots, rows=rows, fill=fill, **ranks)
    return output


def attend_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    slots: Slots,
    *,
    dense: bool,
    scale: float,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from one new token per row to some slots and itself; all is as `decode` takes it."""
    batch, num_heads, head_dim = query.shape
    grouped = query.view(batch, key.shape[1], -1, head_dim).float() * scale
    kept_value = slots.value.float()
    logits = grouped @ slots.key.float().transpose(2, 3)  # [B, Hkv, G, fill]
    if not dense or window is not None:
        dead = _dead(slots.position, position[:, None, None], window)
        logits = logits.masked_fill(dead[:, :, None], -torch.inf)
        kept_value = kept_value.masked_fill(dead[..., None], 0.0)  # 0 · NaN would poison the sum
    own = (grouped * key[:, :, None].float()).sum(-1, keepdim=True)
    more = [] if sinks is None else [sinks.float().view(own.shape[1:]).expand_as(own)]
    weights = torch.cat([logits, own, *more], dim=-1).softmax(-1)
    fill = logits.shape[-1]
    output = weights[..., :fill] @ kept_value + weights[..., fill : fill + 1] * value[:, :, None].float()
    return output.view(batch, num_heads, head_dim).to(query.dtype)


def _evict_one(
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    position: Tensor,
    slots: Slots,
    journal: Journal,
    *,
    window: int | None,
    recent: int,
    static: bool,
    spans: Tensor | None,
) -> None:
    ranks: dict[str, Any] = {"recent": recent, "static": static, "spans": spans}
    lowest, loser = find_loser(position, slots, window=window, **ranks)
    enter(key, value, log_beta, position, slots, journal, lowest=lowest, loser=loser, **ranks)


def find_loser(
    position: Tensor,
    slots: Slots,
    *,
    window: int | None,
    recent: int,
    static: bool,
    spans: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the lowest score of each head's slots `[B, Hkv]` float32, and the slot that has it, int64."""
    now = position[:, None, None]
    scores = _scores(slots.log_beta, slots.position, now, window, recent, static=static, spans=spans)
    lowest = scores.amin(dim=-1, keepdim=True)
    loser = torch.where(scores == lowest, slots.position, -_NEVER).argmax(dim=-1)  # ties: the newest goes
    return lowest[..., 0], loser


def enter(
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    position: Tensor,
    slots: Slots,
    journal: Journal,
    *,
    lowest: Tensor,
    loser: Tensor,
    recent: int,
    static: bool,
    spans: Tensor | None,
) -> None:
    """Write what the losers' slots hold to the journal, and new tokens there where they win, both in place."""
    now = position[:, None, None]
    own = log_beta[..., None] * (1.0 if static else 2.0)
    if spans is not None:
        own = own.masked_fill(protected(now, spans), torch.inf)
    enters = (now >= 0) & ((own > lowest[..., None]) | (recent > 0))
    loser = loser[..., None].long()
    wide = loser[..., None].expand(-1, -1, -1, key.shape[-1])
    new = (key, value, log_beta, position[:, None].expand_as(log_beta))
    # Everything is allocated before anything changes: what fails here has displaced nothing.
    exchanges = [
        _exchange(target, wide if target.dim() == 4 else loser, token, enters)
        for target, token in zip(slots, new, strict=True)
    ]
    journal.slot.copy_(loser[:, :, 0])
    for target, old, (index, held, stays) in zip(slots, journal[:4], exchanges, strict=True):
        as_bytes(old).copy_(held)
        as_bytes(target).scatter_(2, index, stays)


def _exchange(target: Tensor, index: Tensor, new: Tensor, enters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return where in `target` something changes, what lies there, and what will lie there: `new` where it `enters`."""
    held, enters = as_bytes(target).gather(2, index), enters[..., None] if new.dim() == 3 else enters
    stays = torch.where(enters, as_bytes(narrowed(new[:, :, None], target.dtype)), held)
    return index, held[:, :, 0], stays


def _attend_chunk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    slots: Slots,
    *,
    rows: Tensor,
    fill: int,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    heads = slice(None) if window is not None else slice(1)  # without a window every head has the same slots in use
    kept = slots.position[rows, heads, :fill]
    visible_from = positions[:, None, :, None]  # [B, 1, T, 1]
    source = torch.cat([kept, positions[:, None].expand(-1, kept.shape[1], -1)], dim=2)  # [B, 1 | Hkv, fill + T]
    hidden = _dead(source[:, :, None], visible_from, window) | (source[:, :, None] > visible_from)
    all_keys = torch.cat([slots.key[rows, :, :fill].to(key.dtype), key], dim=2)
    all_values = torch.cat([slots.value[rows, :, :fill].to(value.dtype), value], dim=2)
    for tensor in (all_keys, all_values):
        tensor.masked_fill_((source < 0)[..., None], 0.0)  # 0 · NaN would poison the sum
    if hidden.shape[1] > 1:
        hidden = hidden.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if sinks is not None:
        query, all_keys, all_values, hidden = _with_sinks(query, all_keys, all_values, hidden, sinks / scale)
    output = F.scaled_dot_product_attention(
        query, all_keys, all_values, attn_mask=~hidden, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output[..., : value.shape[3]].masked_fill(positions[:, None, :, None] < 0, 0.0)


def _with_sinks(
    query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add a last key that every query sees, whose product with a head's queries is its sink `[Hq]` and its value 0.

    One more component, 0 in all other keys, holds the sink: a mask that did would be as large for each query head.
    """
    component = sinks.to(query.dtype)[:, None, None].expand(*query.shape[:3], 1)
    query = torch.cat([query, component], dim=3)
    keys = F.pad(keys, (0, 1, 0, 1))
    keys[:, :, -1, -1] = 1.0
    return query, keys, F.pad(values, (0, 1, 0, 1)), F.pad(hidden, (0, 1))


def _evict_chunk(
    key: Tensor,
    value: Tensor,
    log_beta: Tensor,
    positions: Tensor,
    slots: Slots,
    *,
    rows: Tensor,
    fill: int,
    **ranks: Any,
) -> None:
    target = survivors(log_beta, positions, slots, rows=rows, fill=fill, **ranks)
    row, head, token = (target >= 0).nonzero(as_tuple=True)
    at = (rows[row], head, target[row, head, token])
    as_bytes(slots.key)[at] = as_bytes(narrowed(key[row, head, token], slots.key.dtype))
    as_bytes(slots.value)[at] = as_bytes(narrowed(value[row, head, token], slots.value.dtype))
    slots.log_beta[at] = log_beta[row, head, token]
    slots.position[at] = positions[row, token].to(torch.int32)


def best(
    slots: Slots,
    count: int,
    *,
    seen: Tensor,
    window: int | None,
    recent: int = 0,
    static: bool = False,
    spans: Tensor | None = None,
) -> Tensor:
    """Choose the `count` slots of each head to keep when there shall be no more: `[R, Hkv, count]` int64, ascending.

    `seen` `[R]` int32 is how many tokens each row has been fed. Empty slots go first, and those kept stay behind the
    others.
    """
    now = seen[:, None, None] - 1
    scores = _scores(slots.log_beta, slots.position, now, window, recent, static=static, spans=spans)
    rank = _rank(scores, slots.position)
    return rank.topk(count, dim=2, largest=False).indices.sort(dim=2).values


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
) -> Tensor:
    """Choose the best M of slots and chunk: `[B, Hkv, T]` int64, the slot that each token of the chunk takes, or −1.

    The n-th survivor takes the n-th slot whose token loses, so that empty slots fill in order. Nothing here reads the
    device.
    """
    length = positions.shape[1]
    span = min(fill + length, slots.position.shape[2])
    now = positions.amax(dim=1)[:, None, None]
    kept_position = slots.position[rows, :, :span]
    new_position = positions[:, None].expand(-1, log_beta.shape[1], -1)
    how: dict[str, Any] = {"static": static, "spans": spans}
    kept_scores = _scores(slots.log_beta[rows, :, :span], kept_position, now, window, recent, **how)
    kept_rank = _rank(kept_scores, kept_position)
    new_rank = _rank(_scores(log_beta, new_position, now, window, recent, **how), new_position)
    new_rank = new_rank.masked_fill(new_position < 0, _PADDING)
    losers = torch.cat([kept_rank, new_rank], dim=2).topk(length, dim=2).indices
    lost = torch.zeros(*losers.shape[:2], span + length, dtype=torch.bool, device=losers.device).scatter_(
        2, losers, True
    )
    vacated, survives = lost[..., :span], ~lost[..., span:]
    vacant = vacated.int().argsort(dim=2, descending=True, stable=True)
    order = (survives.cumsum(dim=2) - 1).clamp(min=0)
    return torch.where(survives, vacant.gather(2, order), -1)


def _dead(source: Tensor, now: Tensor, window: int | None) -> Tensor:
    """Mark positions that hold no token or lie before the window of a query at `now`."""
    dead = source < 0
    return dead if window is None else dead | (source <= now - window)


def finite(scores: Tensor) -> Tensor:
    """Make numbers of static scores, in place: every token is worth more than no token, −inf, and less than a pin."""
    return scores.nan_to_num_(nan=_LEAST)


def protected(position: Tensor, spans: Tensor) -> Tensor:
    """Mark the positions `[…, B, Hkv, N]` of tokens that lie in their row's intervals `[B, 2, 2]`."""
    first, second = spans.clamp(min=0)[:, None, None].unbind(3)  # [B, 1, 1, 2]
    inside = [(position >= span[..., 0]) & (position < span[..., 1]) for span in (first, second)]
    return inside[0] | inside[1]


def _scores(
    log_beta: Tensor,
    position: Tensor,
    now: Tensor,
    window: int | None,
    recent: int = 0,
    *,
    static: bool = False,
    spans: Tensor | None = None,
) -> Tensor:
    """Return log_beta · age, where the token at `now` has age 2, or log_beta as it is.

    The `recent` newest and what is protected have +inf, what lies outside the window and empty slots −inf.
    """
    scores = log_beta if static else log_beta * (now + 2 - position).float()
    if recent:
        scores = scores.masked_fill(position > (now - recent).clamp(min=-1), torch.inf)
    if spans is not None:
        scores = scores.masked_fill(protected(position, spans), torch.inf)
    return scores if window is None else scores.masked_fill(position <= now - window, -torch.inf)


_LEAST = torch.finfo(torch.float32).min
_PADDING = torch.iinfo(torch.int64).max


def _rank(scores: Tensor, position: Tensor) -> Tensor:
    """Return int64 that order by descending score, then ascending position: the smaller, the better; no two are equal.

    The bits of floats ≥ 0 order as integers do, those of negative ones the other way round.
    """
    bits = (scores.nan_to_num(nan=_LEAST, posinf=torch.inf, neginf=-torch.inf) + 0.0).view(torch.int32)  # no −0.0
    descending = ~torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (descending.long() << 32) + position.long() + 2**31
