"""Block sizes: plain functions of the shapes, so that results never depend on a measurement made while running.

No row has been measured on a GPU yet: the numbers are first guesses that compile for sm_80 and sm_90 without spills.
"""

from __future__ import annotations

from dataclasses import dataclass

_FEW_PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100
_MOST_SPLITS = 32


@dataclass(frozen=True, slots=True)
class DecodeLaunch:
    """`block` slots are read at a time; `splits` programs share the slots of one (row, head), `split_slots` each."""

    block: int
    splits: int
    split_slots: int
    warps: int


def decode_launch(*, programs: int, size: int, head_dim: int, element_size: int) -> DecodeLaunch:
    """Split the slots when rows × KV heads (`programs`) are too few to fill a GPU.

    How many of the `size` slots are in use changes nothing: each other split is a kernel to compile, while all wait.
    Wider keys mean fewer of them at a time, and a padded width costs masks: more would spill registers.
    """
    wide_bytes = padded(head_dim) * element_size
    block = 64 if wide_bytes <= 256 else 32 if wide_bytes <= 512 and padded(head_dim) == head_dim else 16
    blocks = -(-size // block)
    splits = max(1, min(_MOST_SPLITS, blocks, -(-_FEW_PROGRAMS // programs)))
    split_slots = -(-blocks // splits) * block
    return DecodeLaunch(block=block, splits=-(-size // split_slots), split_slots=split_slots, warps=4)


@dataclass(frozen=True, slots=True)
class PrefillLaunch:
    """`queries` of a chunk are held by one program, which reads `keys` at a time."""

    queries: int
    keys: int
    warps: int


def prefill_launch(*, head_dim: int, element_size: int) -> PrefillLaunch:
    """Hold fewer queries and keys where a head is wide: they share registers and shared memory."""
    wide_bytes = padded(head_dim) * element_size
    if wide_bytes <= 128:
        return PrefillLaunch(queries=64, keys=32, warps=4)
    if wide_bytes <= 256 and element_size == 2:
        return PrefillLaunch(queries=32, keys=32, warps=8)
    return PrefillLaunch(queries=32 if wide_bytes <= 512 else 16, keys=16, warps=4)


def padded(size: int) -> int:
    """Return the power of two, at least 16, that a tile of `size` needs for a matrix product."""
    return max(16, 1 << (size - 1).bit_length())
