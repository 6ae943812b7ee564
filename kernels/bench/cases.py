"""The shapes that the operations are measured at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Op = Literal["decode", "prefill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation at one shape; `tokens` per row: 1 in decode, a chunk in prefill."""

    op: Op
    rows: int
    num_kv_heads: int
    groups: int
    head_dim: int
    slots: int
    tokens: int
    dtype: Literal["fp32", "fp16", "bf16"]
    window: int | None = None

    @property
    def element_size(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    @property
    def bytes_moved(self) -> int:
        """Count what must cross memory at least: the slots once, the new tokens, queries and outputs."""
        heads = self.rows * self.num_kv_heads
        slots = heads * self.slots * (2 * self.head_dim * self.element_size + 8)
        new = heads * self.tokens * (2 * self.head_dim * self.element_size + 8)
        queries = 2 * heads * self.groups * self.tokens * self.head_dim * self.element_size
        return slots + new + queries


def gpu_cases() -> Iterator[Case]:
    """Yield Qwen3-4B's heads at the budgets of its gates, and odd sizes."""
    qwen3 = {"num_kv_heads": 8, "groups": 4, "head_dim": 128}
    for slots in (512, 1024, 4096, 16_384):
        for rows in (1, 8, 64):
            yield Case(op="decode", rows=rows, slots=slots, tokens=1, dtype="bf16", **qwen3)
    for slots in (1024, 4096):
        yield Case(op="prefill", rows=1, slots=slots, tokens=512, dtype="bf16", **qwen3)
        yield Case(op="prefill", rows=8, slots=slots, tokens=512, dtype="bf16", **qwen3)
    yield Case(op="decode", rows=8, slots=3001, tokens=1, dtype="fp16", num_kv_heads=4, groups=16, head_dim=256)
    yield Case(op="decode", rows=8, slots=4096, tokens=1, dtype="bf16", window=1024, **qwen3)


def small_cases() -> Iterator[Case]:
    """Yield what a CPU does in no time."""
    small = {"num_kv_heads": 2, "groups": 3, "head_dim": 64, "slots": 64}
    for rows in (1, 8):
        yield Case(op="decode", rows=rows, tokens=1, dtype="fp32", **small)
        yield Case(op="prefill", rows=rows, tokens=16, dtype="fp32", **small)
