"""Block sizes: plain functions of shapes and the GPU, so that results never depend on a measurement made while running.

No row has been measured on a GPU yet: the numbers are what compiles without spills for each kind of GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

MOST_SPLITS = 32
_MUCH_SHARED = (80, 90, 100, 103)  # 163 KiB and more; others have 99, or 64
_WARP_GROUPS = (90,)
_WAVES = 8  # programs for each multiprocessor, of which it holds a few at a time


@dataclass(frozen=True, slots=True)
class Chip:
    """What decides the sizes: `capability` × 10 of an NVIDIA GPU, 0 of any other, and how many processors it has."""

    capability: int
    multiprocessors: int

    @classmethod
    def of(cls, device: torch.device) -> Chip:
        """Ask a CUDA device; the interpreter gets what an unknown GPU does."""
        return _chip(device) if device.type == "cuda" else UNKNOWN


UNKNOWN = Chip(capability=0, multiprocessors=132)


@cache
def _chip(device: torch.device) -> Chip:
    has = torch.cuda.get_device_properties(device)
    capability = 0 if torch.version.hip else 10 * has.major + has.minor
    return Chip(capability=capability, multiprocessors=has.multi_processor_count)


@dataclass(frozen=True, slots=True)
class DecodeLaunch:
    """`block` slots are read at a time; `splits` programs share the slots of one (row, head), `split_slots` each."""

    block: int
    splits: int
    split_slots: int
    warps: int
    merge_warps: int


def decode_launch(*, programs: int, size: int, head_dim: int, element_size: int, chip: Chip) -> DecodeLaunch:
    """Split the slots so that rows × KV heads (`programs`) × splits keep all of a GPU at work, and its memory busy.

    How many of the `size` slots are in use changes nothing, as a graph is made for them all. While one block is
    computed, keys and values of two lie in shared memory: wider ones, or less of it, mean fewer slots at a time.
    """
    wide_bytes = padded(head_dim) * element_size
    has_room = element_size <= 2 and (chip.capability in _MUCH_SHARED or wide_bytes <= 128)
    most_bytes = 16 * 1024 if has_room else 8 * 1024
    block = min(64, max(16, most_bytes // wide_bytes))
    blocks, wanted = -(-size // block), -(-_WAVES * chip.multiprocessors // programs)
    splits = -(-blocks // max(1, blocks // wanted, -(-blocks // MOST_SPLITS)))
    split_slots = -(-blocks // splits) * block
    merge_warps = 4 if padded(head_dim) <= 128 else 8
    return DecodeLaunch(block, -(-size // split_slots), split_slots, warps=4, merge_warps=merge_warps)


@dataclass(frozen=True, slots=True)
class PrefillLaunch:
    """`queries` of one KV head are held by one program, which reads `keys` at a time."""

    queries: int
    keys: int
    warps: int


def prefill_launch(*, queries: int, head_dim: int, element_size: int, chip: Chip) -> PrefillLaunch:
    """Hold as many queries and keys as registers and shared memory allow, and no more than a chunk has `queries`.

    At capability 9.0 the products are those of warp groups, each of four warps with 16 queries.
    """
    wide = padded(head_dim)
    if element_size > 2:
        return PrefillLaunch(queries=16, keys=32 if wide <= 64 else 16, warps=4)
    if chip.capability in _WARP_GROUPS:
        if queries <= 64 and wide <= 128:
            return PrefillLaunch(queries=64, keys=64, warps=4)
        return PrefillLaunch(queries=128, keys=64 if wide <= 128 else 32, warps=8)
    return PrefillLaunch(queries=64 if wide <= 128 else 32, keys=64 if wide <= 64 else 32, warps=4)


def padded(size: int) -> int:
    """Return the power of two, at least 16, that a tile of `size` needs for a matrix product."""
    return max(16, 1 << (size - 1).bit_length())
