"""Casts between what slots hold and what kernels compute with; only 8-bit floats need more than a cast."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widened(held, like):
    """Return keys or values for a product: 8-bit ones as what the query is in, as weights in 8 bits would vanish."""
    if held.dtype == tl.float8e4nv:
        held = held.to(like.dtype)
    return held


@triton.jit
def narrowed(new, dtype: tl.constexpr):
    """Return new keys or values as slots hold them; 8 bits hold no infinity, and numbers only up to 448."""
    if dtype == tl.float8e4nv:
        new = tl.clamp(new.to(tl.float32), -448.0, 448.0)
    return new.to(dtype)
