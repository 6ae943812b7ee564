"""What befalls rows between steps in Triton, in all layers at once: a decode is undone, a row is emptied."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trimkv_kernels.launch import padded
from trimkv_kernels.slots import LayerTable, as_bytes

_PIECE = 16  # slots of one program


def undo(table: LayerTable, position: Tensor) -> None:
    """Do what `LayerTable.undo` does, in one kernel."""
    slots, journal = table.slots[0], table.journals[0]
    heads, _, dim = slots.key.shape[1:]
    _undo[(len(table.slots) * len(position) * heads,)](
        position,
        table.addresses,
        as_bytes(slots.key),
        slots.log_beta,
        slots.position,
        journal.slot,
        len(position),
        HEADS=heads,
        DIM=dim,
        WIDE=padded(dim),
        num_warps=1,
    )


@triton.jit(do_not_specialize=["batch"])
def _undo(
    position,
    addresses,
    like_key,
    like_log_beta,
    like_position,
    like_slot,
    batch,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Put back what the token of one (layer, row, KV head) displaced, if it is there; `like_…` only say types."""
    program = tl.program_id(0).to(tl.int64)
    layer, place = program // (batch * HEADS), program % (batch * HEADS)
    now = tl.load(position + place // HEADS)
    of_layer = addresses + layer * 10
    slot_position = tl.load(of_layer + 3).to(like_position.dtype)
    at = place * tl.load(of_layer + 9) + tl.load(tl.load(of_layer + 8).to(like_slot.dtype) + place)
    entered = (now >= 0) & (tl.load(slot_position + at) == now)
    tl.store(slot_position + at, tl.load(tl.load(of_layer + 7).to(like_position.dtype) + place), mask=entered)
    old_log_beta = tl.load(tl.load(of_layer + 6).to(like_log_beta.dtype) + place)
    tl.store(tl.load(of_layer + 2).to(like_log_beta.dtype) + at, old_log_beta, mask=entered)
    dim = tl.arange(0, WIDE)
    wide = entered & (dim < DIM)
    for tensor in tl.static_range(2):
        old = tl.load(tl.load(of_layer + 4 + tensor).to(like_key.dtype) + place * DIM + dim, mask=wide)
        tl.store(tl.load(of_layer + tensor).to(like_key.dtype) + at * DIM + dim, old, mask=wide)


def clear(table: LayerTable, row: int) -> None:
    """Do what `LayerTable.clear` does, in one kernel."""
    slots = table.slots[0]
    heads, _, dim = slots.key.shape[1:]
    most = max(layer.position.shape[2] for layer in table.slots)
    _clear[(triton.cdiv(most, _PIECE), len(table.slots) * heads)](
        row,
        table.addresses,
        as_bytes(slots.value),
        slots.log_beta,
        slots.position,
        HEADS=heads,
        DIM=dim,
        WIDE=padded(dim),
        PIECE=_PIECE,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["row"])
def _clear(
    row,
    addresses,
    like_key,
    like_log_beta,
    like_position,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Empty a piece of the slots of one (layer, KV head); `like_…` only say types."""
    slot, program = tl.program_id(0) * PIECE + tl.arange(0, PIECE), tl.program_id(1)
    of_layer = addresses + program // HEADS * 10
    size = tl.load(of_layer + 9)
    inside = slot < size
    at = (row * HEADS + program % HEADS) * size + slot
    tl.store(tl.load(of_layer + 3).to(like_position.dtype) + at, -1 - slot, mask=inside)
    empty = tl.full([PIECE], -float("inf"), tl.float32)
    tl.store(tl.load(of_layer + 2).to(like_log_beta.dtype) + at, empty, mask=inside)
    dim = tl.arange(0, WIDE)
    values = tl.load(of_layer + 1).to(like_key.dtype) + at[:, None] * DIM + dim[None, :]
    nothing = tl.zeros([PIECE, WIDE], like_key.dtype.element_ty)
    tl.store(values, nothing, mask=inside[:, None] & (dim < DIM)[None, :])
