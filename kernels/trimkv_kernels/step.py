"""A whole decode step in Triton: all that stands between the matrix products of its layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimkv_kernels.decode import attend, enter
from trimkv_kernels.slots import LayerTable
from trimkv_kernels.step_reference import Norm

__all__ = ["activate", "add_norm", "attend", "evict", "rotate"]

_PIECE = 1024  # activations of one program


def add_norm(
    residual: Tensor, added: Tensor | None, norm: Norm, *, before: Norm | None = None, out: Tensor | None = None
) -> Tensor:
    """Do what `step_reference.add_norm` does, in one kernel."""
    rows, size = residual.shape
    out = torch.empty_like(residual) if out is None else out
    block = triton.next_power_of_2(size)
    _add_norm[(rows,)](
        residual,
        added,
        None if before is None else before.weight,
        norm.weight,
        out,
        norm.eps,
        0.0 if before is None else before.eps,
        size,
        OFFSET=norm.offset,
        BLOCK=block,
        num_warps=max(1, min(16, block // 256)),
    )
    return out


@triton.jit
def _add_norm(
    residual,
    added,
    before,
    weight,
    output,
    eps,
    before_eps,
    size,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add one row to the residual stream and norm the sum."""
    column = tl.arange(0, BLOCK)
    inside = column < size
    at = tl.program_id(0).to(tl.int64) * size + column
    kind = residual.dtype.element_ty
    x = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if added is not None:
        new = tl.load(added + at, mask=inside, other=0.0).to(tl.float32)
        if before is not None:
            scale = tl.load(before + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
            new = new * tl.rsqrt(tl.sum(new * new, 0) / size + before_eps) * scale
            new = new.to(kind).to(tl.float32)
        held = (x + new).to(kind)
        tl.store(residual + at, held, mask=inside)
        x = held.to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    x = x * tl.rsqrt(tl.sum(x * x, 0) / size + eps) * scale
    tl.store(output + at, x.to(kind), mask=inside)


def rotate(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    key: Tensor,
    value: Tensor,
    query_norm: Norm | None = None,
    key_norm: Norm | None = None,
) -> Tensor:
    """Do what `step_reference.rotate` does, in one kernel."""
    rows, num_kv_heads, dim = key.shape
    heads = qkv.shape[1] // dim
    query = qkv.new_empty(rows, heads - 2 * num_kv_heads, dim)
    _rotate[(rows, heads)](
        qkv,
        cos,
        sin,
        None if query_norm is None else query_norm.weight,
        None if key_norm is None else key_norm.weight,
        query,
        key,
        value,
        0.0 if query_norm is None else query_norm.eps,
        OFFSET=0.0 if query_norm is None else query_norm.offset,
        QUERIES=heads - 2 * num_kv_heads,
        HEADS=num_kv_heads,
        DIM=dim,
        WIDE=triton.next_power_of_2(dim),
        num_warps=1,
    )
    return query


@triton.jit
def _rotate(
    qkv,
    cos,
    sin,
    query_weight,
    key_weight,
    query,
    key,
    value,
    eps,
    OFFSET: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Norm and rotate one head of one row, and put it where queries, keys or values belong."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, WIDE)
    inside = dim < DIM
    source = qkv + (row * (QUERIES + 2 * HEADS) + head) * DIM
    given = tl.load(source + dim, mask=inside, other=0.0)
    if head >= QUERIES + HEADS:
        at = (row * HEADS + head - QUERIES - HEADS) * DIM + dim
        tl.store(value + at, given.to(value.dtype.element_ty), mask=inside)
    else:
        other = tl.where(dim < DIM // 2, dim + DIM // 2, dim - DIM // 2)
        x = given.to(tl.float32)
        partner = tl.load(source + other, mask=inside, other=0.0).to(tl.float32)
        if query_weight is not None:
            is_query = head < QUERIES
            size = tl.rsqrt(tl.sum(x * x, 0) / DIM + eps)
            x, partner = x * size, partner * size
            x = x * _weight(query_weight, key_weight, dim, inside, is_query, OFFSET)
            partner = partner * _weight(query_weight, key_weight, other, inside, is_query, OFFSET)
        turned = x * tl.load(cos + row * DIM + dim, mask=inside, other=0.0)
        turned += partner * tl.load(sin + row * DIM + dim, mask=inside, other=0.0)
        if head < QUERIES:
            at = (row * QUERIES + head) * DIM + dim
            tl.store(query + at, turned.to(query.dtype.element_ty), mask=inside)
        else:
            at = (row * HEADS + head - QUERIES) * DIM + dim
            tl.store(key + at, turned.to(key.dtype.element_ty), mask=inside)


@triton.jit
def _weight(query_weight, key_weight, dim, inside, is_query, OFFSET: tl.constexpr):
    """Load the weights of a query's norm or of a key's."""
    of_query = tl.load(query_weight + dim, mask=inside & is_query, other=0.0)
    of_key = tl.load(key_weight + dim, mask=inside & (is_query == 0), other=0.0)
    return of_query.to(tl.float32) + of_key.to(tl.float32) + OFFSET


def activate(gate_up: Tensor, kind: str) -> Tensor:
    """Do what `step_reference.activate` does, in one kernel."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(rows, size)
    _activate[(rows, triton.cdiv(size, _PIECE))](
        gate_up, output, size, IS_SILU=kind == "silu", BLOCK=_PIECE, num_warps=4
    )
    return output


@triton.jit
def _activate(gate_up, output, size, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply a piece of one row's second half by the activation of its first."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    inner = gate
    if not IS_SILU:  # g · (1 + tanh(u)) / 2 = g · sigmoid(2 · u)
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    active = gate / (1.0 + tl.exp(tl.minimum(-inner, 80.0))) * up
    tl.store(output + row * size + column, active.to(output.dtype.element_ty), mask=inside)


def evict(
    keys: Tensor,
    values: Tensor,
    log_beta: Tensor,
    position: Tensor,
    table: LayerTable,
    *,
    lowest: Tensor,
    loser: Tensor,
    recent: int = 0,
    static: bool = False,
    spans: Tensor | None = None,
) -> None:
    """Do what `step_reference.evict` does, in one kernel for all layers."""
    layers, rows, heads, dim = keys.shape
    slots, journal = table.slots[0], table.journals[0]
    _evict[(layers * rows * heads,)](
        keys,
        values,
        log_beta.contiguous(),
        position,
        lowest,
        loser,
        table.addresses,
        slots.key,
        slots.log_beta,
        slots.position,
        journal.slot,
        None if spans is None else spans.contiguous(),
        rows,
        HEADS=heads,
        DIM=dim,
        WIDE=triton.next_power_of_2(dim),
        RECENT=recent,
        STATIC=static,
        num_warps=1,
    )


@triton.jit(do_not_specialize=["batch"])
def _evict(
    keys,
    values,
    log_beta,
    position,
    lowest,
    loser,
    addresses,
    like_key,
    like_log_beta,
    like_position,
    like_slot,
    spans,
    batch,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    RECENT: tl.constexpr,
    STATIC: tl.constexpr,
):
    """Let the new token of one (layer, row, KV head) take the loser's slot, if it wins; `like_…` only say types."""
    program = tl.program_id(0).to(tl.int64)
    layer, place = program // (batch * HEADS), program % (batch * HEADS)
    row = place // HEADS
    of_layer = addresses + layer * 10
    slots = (
        tl.load(of_layer).to(like_key.dtype),
        tl.load(of_layer + 1).to(like_key.dtype),
        tl.load(of_layer + 2).to(like_log_beta.dtype),
        tl.load(of_layer + 3).to(like_position.dtype),
    )
    journal = (
        tl.load(of_layer + 4).to(like_key.dtype),
        tl.load(of_layer + 5).to(like_key.dtype),
        tl.load(of_layer + 6).to(like_log_beta.dtype),
        tl.load(of_layer + 7).to(like_position.dtype),
        tl.load(of_layer + 8).to(like_slot.dtype),
    )
    intervals = spans
    if spans is not None:
        intervals = spans + row * 4
    dim = tl.arange(0, WIDE)
    enter(
        tl.load(keys + program * DIM + dim, mask=dim < DIM, other=0.0),
        tl.load(values + program * DIM + dim, mask=dim < DIM, other=0.0),
        tl.load(log_beta + program),
        tl.load(position + row),
        tl.load(lowest + program),
        tl.load(loser + program),
        slots,
        journal,
        intervals,
        place,
        tl.load(of_layer + 9),
        dim,
        DIM,
        RECENT,
        STATIC,
    )
