"""What a cache still holds of one sequence, and what follows from it (retention.md, section 8): plain numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMemory:
    """What one KV head holds, in the order of positions; `threshold` is its lowest score, None while slots are free."""

    positions: tuple[int, ...]
    log_beta: tuple[float, ...]
    threshold: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMemory:
    """The heads of one layer, each with `slots` slots; in a layer with a window nothing older is held."""

    slots: int
    window: int | None
    heads: tuple[HeadMemory, ...]
    recent: int = 0  # the newest tokens, which are pinned


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """What all layers hold of the `seen` tokens of a sequence."""

    seen: int
    layers: tuple[LayerMemory, ...]

    @property
    def heads(self) -> Iterator[tuple[LayerMemory, HeadMemory]]:
        """Yield every (layer, head) pair."""
        return ((layer, head) for layer in self.layers for head in layer.heads)

    @property
    def num_heads(self) -> int:
        """Count the KV heads of all layers."""
        return sum(len(layer.heads) for layer in self.layers)

    @property
    def full(self) -> bool:
        """Say whether some head has no free slot, so that tokens compete."""
        return any(head.threshold is not None for _, head in self.heads)

    def shares(self) -> list[float]:
        """Return for each position the share of (layer, head) pairs that still hold it: `[seen]`, 0 to 1."""
        counts = [0] * self.seen
        for _, head in self.heads:
            for position in head.positions:
                counts[position] += 1
        return [count / self.num_heads for count in counts]

    def survivals(self) -> list[float]:
        """Return for how many more tokens the last head is expected to hold each position: 0 = gone, inf = no end."""
        longest = [0.0] * self.seen
        for layer, head in self.heads:
            for position, log_beta in zip(head.positions, head.log_beta, strict=True):
                expected = survival(self.seen, position, log_beta, head.threshold, layer.window)
                expected = max(expected, float(position + layer.recent - self.seen))
                longest[position] = max(longest[position], expected)
        return longest

    def next_out(self) -> list[tuple[int, int]]:
        """List (position, heads) of what the heads without a free slot would give up first, most heads first."""
        counts: Counter[int] = Counter()
        for layer, head in self.heads:
            if head.threshold is not None:
                counts[_lowest(self.seen, head, layer.recent)] += 1
        return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def survival(seen: int, position: int, log_beta: float, threshold: float | None, window: int | None) -> float:
    """Estimate for how many more tokens a head holds one; the threshold moves, so this is no promise."""
    in_window = math.inf if window is None else position + window - seen
    if threshold is None or log_beta >= 0.0:
        return max(0.0, in_window)
    return max(0.0, min(in_window, position + threshold / log_beta - seen - 1))


def median_age(seen: int, head: HeadMemory) -> int:
    """Return the median age in tokens of what a head holds: its horizon; 0 when it holds nothing."""
    return seen - head.positions[len(head.positions) // 2] if head.positions else 0


def _lowest(seen: int, head: HeadMemory, recent: int) -> int:
    """Return the position with the lowest score, the pinned newest ones aside; of equal ones the newest goes."""
    held = zip(head.positions, head.log_beta, strict=True)
    scores = ((log_beta * (seen + 1 - p), -p) for p, log_beta in held if p < seen - recent)
    return -min(scores)[1]
