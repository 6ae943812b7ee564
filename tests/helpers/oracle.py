"""The eviction rule and attention in plain Python over the whole history: slow, and written from the paper alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

LEAST = float(np.finfo(np.float32).min)


@dataclass
class Head:
    """One (row, KV head): every token ever seen, and which of them are kept."""

    budget: int
    window: int | None = None
    static: bool = False  # log_beta is the score
    spans: tuple[tuple[int, int], ...] = ()  # half-open intervals of positions that are protected in the next step
    sinks: tuple[float, ...] = ()  # one more logit of each query head's softmax, which has no value
    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    log_betas: list[np.float32] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)

    def score(self, position: int, seen: int) -> float:
        if self.window is not None and position <= seen - 1 - self.window:
            return -math.inf
        if any(first <= position < end for first, end in self.spans):
            return math.inf
        if self.static:
            score = float(self.log_betas[position])
            return max(LEAST, score)  # NaN is not
        return float(np.float32(self.log_betas[position]) * np.float32(seen + 1 - position))

    def attend(self, query: np.ndarray, now: int, candidates: list[int], scale: float, sink: float) -> np.ndarray:
        seen = [p for p in candidates if p <= now and (self.window is None or p > now - self.window)]
        logits = np.array([float(query @ self.keys[p]) * scale for p in seen])
        highest = max(sink, logits.max())
        weights = np.exp(logits - highest)
        return (weights / (weights.sum() + math.exp(sink - highest))) @ np.stack([self.values[p] for p in seen])

    def step(
        self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, log_betas: np.ndarray, scale: float
    ) -> np.ndarray:
        """Feed a chunk: queries `[G, T, D]`, keys and values `[T, D]`, log_betas `[T]`; return outputs `[G, T, D]`."""
        first = len(self.keys)
        self.keys += list(keys)
        self.values += list(values)
        self.log_betas += list(log_betas)
        seen = len(self.keys)
        candidates = self.kept + list(range(first, seen))
        sinks = self.sinks or [-math.inf] * len(queries)
        output = [
            [self.attend(group[t], first + t, candidates, scale, sink) for t in range(len(keys))]
            for group, sink in zip(queries, sinks, strict=True)
        ]
        best = sorted(candidates, key=lambda p: (-self.score(p, seen), p))
        self.kept = sorted(best[: self.budget])
        return np.array(output)
