"""Snapshots of a row of the cache while the model works: few numbers, and never waiting for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimkv_cli.cache.retention_cache import LayerCache, RetentionCache
from trimkv_cli.events import CacheSnapshot

_BINS = 64
_SAMPLED = 256  # slots per head; of a larger cache every n-th is looked at


@dataclass(frozen=True, slots=True)
class _Pending:
    """Numbers on their way to the host, and the host's part of the snapshot that they belong to."""

    seen: int
    kept_per_head: int
    shares: Tensor  # [bins]
    medians: Tensor  # [L, Hkv], of kept positions
    done: Any  # a CUDA event, None on a CPU


class CacheSnapshots:
    """Take snapshots of a cache; on a GPU each is one call behind, so that nothing waits."""

    def __init__(self, cache: RetentionCache) -> None:
        self._cache = cache
        self._pending: _Pending | None = None
        self._last: CacheSnapshot | None = None

    @torch.inference_mode()
    def take(self, row: int) -> CacheSnapshot | None:
        """Return the newest snapshot that has arrived and start the next one; None when there is none yet."""
        if self._pending is None and self._cache.seen[row] > 0:
            self._pending = self._start(row)
        if self._pending is not None and (self._pending.done is None or self._pending.done.query()):
            self._last = self._arrived(self._pending)
            self._pending = None
        return self._last

    def _start(self, row: int) -> _Pending:
        seen, layers = self._cache.seen[row], self._cache.layers
        bins = min(_BINS, seen)
        looks = [_look(layer, row, seen, bins) for layer in layers]
        counts = torch.stack([count for count, _ in looks]).mean(dim=0)
        medians = torch.stack([median for _, median in looks])
        if counts.device.type != "cuda":
            return _Pending(seen, self._cache.kept_per_head(row), counts, medians, None)
        shares, positions = (_to_host(tensor) for tensor in (counts, medians))
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return _Pending(seen, self._cache.kept_per_head(row), shares, positions, done)

    def _arrived(self, pending: _Pending) -> CacheSnapshot:
        seen = pending.seen
        ages = [[max(0, round(seen - position)) for position in layer] for layer in pending.medians.tolist()]
        return CacheSnapshot(
            seen_tokens=seen,
            kept_per_head=pending.kept_per_head,
            slots=self._cache.kv_budget,
            shares=tuple(pending.shares.tolist()),
            horizons=tuple(tuple(layer) for layer in ages),
        )


def _to_host(tensor: Tensor) -> Tensor:
    """Start a copy that nobody waits for: it takes page-locked memory to go on beside the host."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _look(layer: LayerCache, row: int, seen: int, bins: int) -> tuple[Tensor, Tensor]:
    """Return the share of a layer's heads that hold each bin `[bins]`, and each head's median position `[Hkv]`."""
    stride = max(1, layer.size // _SAMPLED)
    position = layer.slots.position[row, :, ::stride].long()  # [Hkv, sampled]
    first = 0 if layer.window is None else max(0, seen - layer.window)
    held = position >= first
    places = torch.where(held, ((position + 1) * bins - 1) // seen, bins).flatten()
    counts = torch.zeros(bins + 1, device=position.device).scatter_add_(
        0, places, torch.ones(places.shape, device=position.device)
    )
    edges = torch.arange(bins + 1, device=position.device) * seen // bins
    shares = counts[:bins] * stride / (edges[1:] - edges[:-1]) / position.shape[0]
    median = torch.where(held, position.float(), torch.nan).nanmedian(dim=1).values
    return shares.clamp(max=1.0), median.nan_to_num(nan=float(seen))
