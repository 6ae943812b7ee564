"""The bounded KV store of a model: M slots per (layer, row, KV head), allocated once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trimkv_cli.errors import UsageError
from trimkv_cli.retained import HeadMemory, LayerMemory, Retained
from trimkv_kernels import Journal, Operations, SlotPool, Slots, operations_for


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The slots of one layer, what its last decode displaced, what works on them, and its window.

    The query itself counts in the window; None = no window.
    """

    slots: Slots
    journal: Journal
    window: int | None
    operations: Operations
    pool: tuple[SlotPool, int] | None = None  # whose layer this is, on a CPU

    @property
    def size(self) -> int:
        """Slots per KV head."""
        return self.slots.position.shape[2]


class RetentionCache:
    """Hold `rows` sequences of at most `kv_budget` tokens per head; a layer with a window W has min(M, W) slots.

    `seen[row]` counts the tokens that a row has been fed, on the host: its fill is min(seen, slots), so nothing has to
    be read from the device.
    """

    def __init__(
        self,
        *,
        rows: int,
        kv_budget: int,
        num_kv_heads: int,
        head_dim: int,
        windows: Sequence[int | None],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.kv_budget = kv_budget
        self.seen = [0] * rows
        shape: dict[str, Any] = {"rows": rows, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "dtype": dtype}
        sizes = [kv_budget if window is None else min(kv_budget, window) for window in windows]
        operations = operations_for(device)
        self.pools = _make_pools(windows, sizes, shape) if device.type == "cpu" else {}
        self.layers: list[LayerCache] = []
        for index, (window, size) in enumerate(zip(windows, sizes, strict=True)):
            if window in self.pools:
                pool, place = self.pools[window], windows[:index].count(window)
                layer = LayerCache(pool.slots(place), pool.journal(place), window, operations, (pool, place))
            else:
                slots = Slots.empty(slots=size, device=device, **shape)
                layer = LayerCache(slots, Journal.beside(slots), window, operations)
            self.layers.append(layer)

    @property
    def nbytes(self) -> int:
        return sum(layer.slots.nbytes for layer in self.layers)

    @property
    def journal_nbytes(self) -> int:
        return sum(layer.journal.nbytes for layer in self.layers)

    def undo_decode(self, positions: Sequence[int]) -> None:
        """Take back a decode step, finished or not: row i was fed a token at `positions[i]`, or none (−1).

        Only the last decode of a row can be taken back, and nothing else may have happened to the row since.
        """
        position = torch.tensor(positions, dtype=torch.int32).to(self.layers[0].slots.position.device)
        for layer in self.layers:
            layer.journal.undo(position, layer.slots)
        for row, seen in enumerate(positions):
            if seen >= 0:
                self.seen[row] = seen

    def clear(self, row: int) -> None:
        """Forget everything in `row`."""
        self.seen[row] = 0
        for pool in self.pools.values():
            pool.clear(row)
        for layer in (layer for layer in self.layers if layer.pool is None):
            layer.slots.rows(row, 1).clear()

    def copy(self, source: int, target: int) -> None:
        """Make `target` an exact copy of `source`."""
        self.seen[target] = self.seen[source]
        for layer in self.layers:
            for tensor in layer.slots:
                tensor[target].copy_(tensor[source])

    def save_row(self, row: int) -> tuple[Slots, ...]:
        """Copy the slots in use of `row` to host memory, `[1, Hkv, slots in use, …]` per layer."""
        return tuple(
            Slots(*(tensor.to("cpu", copy=True) for tensor in layer.slots.rows(row, 1).head(self._used(row, layer))))
            for layer in self.layers
        )

    def load_row(self, row: int, layers: Sequence[Slots], *, seen: int) -> None:
        """Make `row` what `save_row` copied when it had seen `seen` tokens."""
        self.clear(row)
        self.seen[row] = seen
        for layer, saved in zip(self.layers, layers, strict=True):
            target = layer.slots.rows(row, 1).head(saved.position.shape[2])
            for old, new in zip(target, saved, strict=True):
                old.copy_(new)

    def kept(self, row: int) -> list[list[list[int]]]:
        """Return the kept positions, `[layer][head][ascending]`."""
        return [
            [sorted(p for p in head if p >= 0) for head in layer.slots.position[row].tolist()] for layer in self.layers
        ]

    def pin(self, row: int, positions: Iterable[int]) -> int:
        """Give the tokens at `positions` that `row` still holds the score +inf; return how many heads' slots that are.

        Raises:
            UsageError: some head would have no other slot left; nothing is pinned.
        """
        wanted = torch.tensor(sorted(positions), dtype=torch.int32, device=self.layers[0].slots.position.device)
        chosen = [torch.isin(layer.slots.position[row], wanted) for layer in self.layers]
        for layer, mask in zip(self.layers, chosen, strict=True):
            most = int((mask | (layer.slots.log_beta[row] == torch.inf)).sum(-1).max())
            if most >= layer.size:
                raise UsageError(
                    f"{most} pinned tokens leave none of {layer.size} slots per head to the others", hint="pin less"
                )
        for layer, mask in zip(self.layers, chosen, strict=True):
            layer.slots.log_beta[row].masked_fill_(mask, torch.inf)
        return sum(int(mask.sum()) for mask in chosen)

    def ages(self, row: int) -> torch.Tensor:
        """Return the ages in tokens of all that `row` keeps, in ascending order, in host memory."""
        positions = torch.cat([layer.slots.position[row].flatten() for layer in self.layers]).cpu()
        return (self.seen[row] - positions[positions >= 0]).sort().values

    def retained(self, row: int) -> Retained:
        """Return what every layer and head holds of `row`, with the lowest score of each head that is full."""
        layers = (_remembered(layer, row, self.seen[row]) for layer in self.layers)
        return Retained(seen=self.seen[row], layers=tuple(layers))

    def kept_per_head(self, row: int) -> int:
        """Return the slots in use per head of the largest layer."""
        return max(self._used(row, layer) for layer in self.layers)

    def evicted(self, row: int) -> int:
        """Count the tokens lost so far, over all layers and heads."""
        heads = self.layers[0].slots.position.shape[1]
        return sum(self.seen[row] - self._used(row, layer) for layer in self.layers) * heads

    def _used(self, row: int, layer: LayerCache) -> int:
        return min(self.seen[row], layer.size)


def _make_pools(
    windows: Sequence[int | None], sizes: Sequence[int], shape: Mapping[str, Any]
) -> dict[int | None, SlotPool]:
    """Allocate the layers of each window together."""
    return {
        window: SlotPool(layers=windows.count(window), slots=size, window=window, **shape)
        for window, size in dict(zip(windows, sizes, strict=True)).items()
    }


def _remembered(layer: LayerCache, row: int, seen: int) -> LayerMemory:
    positions, log_betas = layer.slots.position[row].cpu(), layer.slots.log_beta[row].cpu()  # [Hkv, M]
    first = 0 if layer.window is None else max(0, seen - layer.window)
    heads = []
    for position, log_beta in zip(positions, log_betas, strict=True):
        held = (position >= first).nonzero()[:, 0]
        held = held[position[held].argsort()]
        scores = log_beta[held] * (seen + 1 - position[held]).float()
        heads.append(
            HeadMemory(
                positions=tuple(position[held].tolist()),
                log_beta=tuple(log_beta[held].tolist()),
                threshold=float(scores.min()) if len(held) == layer.size else None,
            )
        )
    return LayerMemory(slots=layer.size, window=layer.window, heads=tuple(heads))
