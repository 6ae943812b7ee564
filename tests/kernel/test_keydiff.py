"""KeyDiff's scores and what they evict, against arithmetic on lists."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trimkv_kernels import Journal, SlotPool, Slots, reference
from trimkv_kernels.keydiff import compare_keys, key_scores

HEADS, DIM, SCALE = 2, 6, 0.4


def plain_scores(keys: list[list[float]]) -> list[float]:
    """Return −cos(k, mean of the normalised keys) of each key (arXiv 2504.15364)."""
    units = [[x / math.hypot(*key) for x in key] for key in keys]
    mean = [sum(column) / len(units) for column in zip(*units, strict=True)]
    return [-sum(x * y for x, y in zip(unit, mean, strict=True)) / math.hypot(*mean) for unit in units]


class PlainHead:
    """One (row, KV head): every key ever seen, and the positions that are kept."""

    def __init__(self, size: int, window: int | None, pinned: set[int], recent: int) -> None:
        self.size, self.window, self.pinned, self.recent = size, window, pinned, recent
        self.keys: list[list[float]] = []
        self.kept: list[int] = []

    def feed(self, keys: list[list[float]]) -> None:
        candidates = self.kept + list(range(len(self.keys), len(self.keys) + len(keys)))
        self.keys += keys
        now = len(self.keys) - 1
        seen = [p for p in candidates if self.window is None or p > now - self.window]
        scores = dict(zip(seen, plain_scores([self.keys[p] for p in seen]), strict=True))
        stay = {p for p in seen if p in self.pinned or p > now - self.recent}
        rank = {p: math.inf if p in stay else scores.get(p, -math.inf) for p in candidates}
        self.kept = sorted(sorted(candidates, key=lambda p: (-rank[p], p))[: self.size])


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(("size", "window", "recent"), [(9, None, 0), (7, None, 3), (8, 11, 0), (2, None, 0)])
def test_the_keys_most_unlike_the_others_stay(size: int, window: int | None, recent: int, pooled: bool) -> None:
    """Catches a mean over empty or outdated slots, one that is not normalised, a pin that is scored, a stale score."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"rows": 2, "num_kv_heads": HEADS, "slots": size, "head_dim": DIM, "dtype": torch.float32}
    ranks: dict[str, Any] = {"window": window, "recent": recent, "static": True}
    shape["rows"] = 2 if size % 2 else 3
    pool = SlotPool(layers=1, compares_keys=True, **ranks, **shape)
    slots = pool.slots(0) if pooled else Slots.empty(device=torch.device("cpu"), **shape)
    if not pooled:
        slots.key.fill_(torch.nan)  # what no token has written must never be read
    journal = pool.journal(0) if pooled else Journal.beside(slots)
    pinned = {0, 1} if size > 2 else set()
    plain = [[PlainHead(size, window, pinned, recent) for _ in range(HEADS)] for _ in range(2)]
    seen = [0, 0]
    for length in (5, 1, 1, 7, 1, 1, 1, 1, 12, 1, 1, 1):
        # The second row pauses twice; a chunk of it is shorter, and padded.
        counts = [length, max(0, length - 2) if length > 1 else int(seen[0] % 3 != 0)]
        positions = torch.full((2, length), -1, dtype=torch.int32)
        for row, count in enumerate(counts):
            positions[row, length - count :] = torch.arange(seen[row], seen[row] + count)
        key = torch.randn(2, HEADS, length, DIM) + 0.5
        log_beta = torch.zeros(2, HEADS, length).masked_fill((positions < 2)[:, None] & bool(pinned), torch.inf)
        fill = min(size, max(seen))
        where: dict[str, Any] = {"fill": fill, "window": window}
        how: dict[str, Any] = {"scale": SCALE, "fill": fill, **ranks}
        if length > 1:
            rows = torch.arange(2)
            scores = compare_keys(key, log_beta, positions, slots, rows=rows, **where)
            reference.prefill(key, key, key, scores, positions, slots, rows=rows, **how)
        elif pooled:
            now = positions[:, 0]
            bias = pool.begin(now, dense=False)
            pool.attend(0, key[:, :, 0], key[:, :, 0], key[:, :, 0], bias, held=pool.held, scale=SCALE)
            pool.evict(log_beta[:, :, 0][None], now)
        else:
            scores = compare_keys(key, log_beta, positions, slots, rows=None, **where)
            one = (key[:, :, 0],) * 3
            reference.decode(*one, scores[:, :, 0], positions[:, 0], slots, journal, dense=False, **how)
        for row, count in enumerate(counts):
            seen[row] += count
            for head in range(HEADS if count else 0):
                plain[row][head].feed(key[row, head, length - count :].tolist())
        held = [[sorted(p for p in head if p >= 0) for head in row] for row in slots.position[:2].tolist()]
        assert held == [[head.kept for head in row] for row in plain]
    assert not slots.log_beta.isnan().any()


def test_keys_that_are_not_there_or_no_numbers_spoil_nothing() -> None:
    """Catches a key without a token in the mean, a division by the length of nothing, a score that is no number."""
    keys = torch.randn(3, 4, DIM)
    alive = torch.tensor([[True, True, True, False], [True, True, False, False], [False] * 4])
    keys[2] = 0.0
    scores = key_scores(keys, alive)
    assert scores[0, :3].tolist() == pytest.approx(plain_scores(keys[0, :3].tolist()), abs=1e-6)
    assert scores.isfinite().all()
    assert key_scores(torch.full((1, 2, DIM), torch.nan), torch.ones(1, 2, dtype=torch.bool)).isfinite().all()
