"""The bounded store of a model, allocated once: M slots per (layer, row, KV head), and states of constant size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimkv_cli.cache.linear_state import LinearState, State
from trimkv_cli.cache.rebase import Rebase
from trimkv_cli.cache.transfers import to_device
from trimkv_cli.errors import UsageError
from trimkv_cli.events import HeadMemory, LayerMemory, Retained
from trimkv_cli.model.families import StateShape
from trimkv_kernels import Journal, LayerTable, Operations, SlotPool, Slots, operations_for
from trimkv_kernels.reference import best


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The slots of one layer, what its last decode displaced, what works on them, its window and its pinned newest.

    The query itself counts in the window; None = no window. Where scores are `static`, log_beta is the score.
    """

    slots: Slots
    journal: Journal
    window: int | None
    operations: Operations
    recent: int = 0
    static: bool = False
    compares_keys: bool = False  # static scores are found from all keys before each eviction
    pool: tuple[SlotPool, int] | None = None  # whose layer this is, on a CPU

    @property
    def ranks(self) -> dict[str, Any]:
        """How the operations rank its tokens, beside the window."""
        return {"recent": self.recent, "static": self.static}

    @property
    def size(self) -> int:
        """Slots per KV head."""
        return self.slots.position.shape[2]


class SavedRow(NamedTuple):
    """A row in host memory: the slots in use `[1, Hkv, slots, …]` per layer with K/V, and the other layers' states."""

    layers: tuple[Slots, ...]
    states: tuple[State, ...]


class RetentionCache:
    """Hold `rows` sequences of at most `kv_budget` tokens per head; a layer with a window W has min(M, W) slots.

    `layers` are those with keys and values, `states` belong to those with linear attention, both in the model's order.

    `seen[row]` counts the tokens that a row has been fed, on the host: its fill is min(seen, slots), so nothing has to
    be read from the device.

    `spans` `[rows, 2, 2]` int32, where sequences have protected tokens, are the half-open intervals of positions that
    `protect` named for each row. They follow no copy: whoever gives a row to a sequence names its own.
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
        recent: int = 0,
        static: bool = False,
        compares_keys: bool = False,
        protects: bool = False,
        evicts: bool = True,
        state: StateShape | None = None,
    ) -> None:
        self.kv_budget = kv_budget
        self.recent = recent
        self.spans = torch.zeros(rows, 2, 2, dtype=torch.int32, device=device) if protects else None
        self.rebase: Rebase | None = None  # set where sequences may outgrow the model's positions
        self.seen = [0] * rows
        self._missing = [[0] * rows for _ in windows]  # of the tokens seen, those lost while there were fewer slots
        shape: dict[str, Any] = {"rows": rows, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "dtype": dtype}
        sizes = [_size(kv_budget, window) for window in windows]
        operations = operations_for(device)
        if not evicts:
            operations = operations._replace(decode=partial(operations.decode, evict=False))
        ranks: dict[str, Any] = {"recent": recent, "static": static, "compares_keys": compares_keys}
        self.pools = _make_pools(windows, sizes, ranks, shape) if device.type == "cpu" else {}
        self._table: LayerTable | None = None
        self.layers: list[LayerCache] = []
        for index, (window, size) in enumerate(zip(windows, sizes, strict=True)):
            if window in self.pools:
                pool, place = self.pools[window], windows[:index].count(window)
                layer = LayerCache(
                    pool.slots(place), pool.journal(place), window, operations, **ranks, pool=(pool, place)
                )
            else:
                slots = Slots.empty(slots=size, device=device, **shape)
                layer = LayerCache(slots, Journal.beside(slots), window, operations, **ranks)
            self.layers.append(layer)
        self.states = () if state is None else _make_states(state, rows, device)

    def held(self, row: int) -> int:
        """Return a number of tokens of which every layer with slots for so many holds all."""
        return self.seen[row] - max(missing[row] for missing in self._missing)

    def resize(self, kv_budget: int, rows: Sequence[int] = ()) -> int:
        """Change the slots per head of all layers; return how many tokens of `rows` this evicts, over layers and heads.

        Fewer slots keep the best by score as it is now; more begin empty. Only one layer is there twice at a time; on a
        CPU, where layers lie together, one tensor of them all while it grows.
        """
        lost, self._table = 0, None
        pools = [
            (pool, self._resizing(pool, size))
            for pool in self.pools.values()
            if (size := _size(kv_budget, pool.window)) != pool.size
        ]
        for index, layer in enumerate(self.layers):
            size = _size(kv_budget, layer.window)
            used = [self._used(row, index) for row in range(len(self.seen))]
            lost += sum(max(0, used[row] - size) for row in rows) * layer.slots.position.shape[1]
            if size > layer.size:
                self._missing[index] = [seen - n for seen, n in zip(self.seen, used, strict=True)]
            if layer.pool is None and size != layer.size:
                self.layers[index] = _resized(layer, size, self._seen_tensor(), self.spans)
        for pool, resize in pools:
            resize()
            self._show(pool)
        self.kv_budget = kv_budget
        return lost

    def _resizing(self, pool: SlotPool, size: int) -> Callable[[], None]:
        """Choose what stays of the layers of a pool, and return what resizes it."""
        count, seen = min(size, pool.size), self._seen_tensor()
        places = [layer.pool[1] for layer in self.layers if layer.pool is not None and layer.pool[0] is pool]
        rows, heads = pool.slots(0).position.shape[:2]
        keep = torch.empty(len(places), rows, heads, count, dtype=torch.int64)
        for chosen, place in zip(keep, places, strict=True):
            how: dict[str, Any] = {"recent": pool.recent, "static": pool.static, "spans": self.spans}
            chosen.copy_(best(pool.slots(place), count, seen=seen, window=pool.window, **how))
        return pool.resizing(keep, size)

    def _show(self, pool: SlotPool) -> None:
        """Let the layers of a pool see where their slots are now."""
        for index, layer in enumerate(self.layers):
            if layer.pool is not None and layer.pool[0] is pool:
                place = layer.pool[1]
                self.layers[index] = replace(layer, slots=pool.slots(place), journal=pool.journal(place))

    def _seen_tensor(self) -> Tensor:
        return torch.tensor(self.seen, dtype=torch.int32).to(self.layers[0].slots.position.device)

    @property
    def table(self) -> LayerTable:
        """Where slots and journals of all layers lie, until they are resized; not for layers in pools."""
        if self._table is None:
            self._table = LayerTable.of([(layer.slots, layer.journal) for layer in self.layers])
        return self._table

    @property
    def nbytes(self) -> int:
        ranks = 0 if self.rebase is None else self.rebase.nbytes
        states = sum(state.now.nbytes for state in self.states)
        return sum(layer.slots.nbytes for layer in self.layers) + states + ranks

    @property
    def journal_nbytes(self) -> int:
        states = sum(state.journal_nbytes for state in self.states)
        return sum(layer.journal.nbytes for layer in self.layers) + states

    def undo_decode(self, positions: Sequence[int]) -> None:
        """Take back a decode step, finished or not: row i was fed a token at `positions[i]`, or none (−1).

        Only the last decode of a row can be taken back, and nothing else may have happened to the row since.
        """
        position = to_device(positions, self.layers[0].slots.position.device, torch.int32)
        for pool in self.pools.values():
            pool.undo(position)
        if not self.pools:
            self.layers[0].operations.undo(self.table, position)
        for state in self.states:
            state.undo(position)
        for row, seen in enumerate(positions):
            if seen >= 0:
                self.seen[row] = seen

    def clear(self, row: int) -> None:
        """Forget everything in `row`."""
        self.seen[row] = 0
        for missing in self._missing:
            missing[row] = 0
        for pool in self.pools.values():
            pool.clear(row)
        if not self.pools:
            self.layers[0].operations.clear(self.table, row)
        for state in self.states:
            state.clear(row)
        if self.rebase is not None:
            self.rebase.clear(row)

    def copy(self, source: int, target: int) -> None:
        """Make `target` an exact copy of `source`, down to what its last decode displaced."""
        self.seen[target] = self.seen[source]
        for missing in self._missing:
            missing[target] = missing[source]
        for layer in self.layers:
            for tensor in (*layer.slots, *layer.journal):
                tensor[target].copy_(tensor[source])
        for state in self.states:
            state.copy(source, target)
        if self.rebase is not None:
            self.rebase.copy(source, target)

    def save_row(self, row: int) -> SavedRow:
        """Copy what `row` holds to host memory."""
        layers = tuple(
            Slots(*(tensor.to("cpu", copy=True) for tensor in layer.slots.rows(row, 1).head(self._used(row, index))))
            for index, layer in enumerate(self.layers)
        )
        return SavedRow(layers, tuple(state.now.at(slice(row, row + 1)).to("cpu") for state in self.states))

    def load_row(self, row: int, saved_row: SavedRow, *, seen: int) -> None:
        """Make `row` what `save_row` copied when it had seen `seen` tokens; of more than there are slots, the best."""
        self.clear(row)
        self.seen[row] = seen
        spans = None if self.spans is None else self.spans[row : row + 1].cpu()
        for layer, missing, kept in zip(self.layers, self._missing, saved_row.layers, strict=True):
            saved = _at_most(kept, layer, seen, spans)
            count = saved.position.shape[2]
            missing[row] = seen - count if count < layer.size else 0
            target = layer.slots.rows(row, 1).head(count)
            for old, new in zip(target, saved, strict=True):
                old.copy_(new)
        for state, kept_state in zip(self.states, saved_row.states, strict=True):
            state.load(row, kept_state)

    def fitted(self, layers: Sequence[Slots], *, seen: int, spans: Tensor | None = None) -> tuple[Slots, ...]:
        """Return what of a saved row that has seen `seen` tokens there are slots for, what `spans` protect first."""
        return tuple(_at_most(kept, layer, seen, spans) for kept, layer in zip(layers, self.layers, strict=True))

    def kept(self, row: int) -> list[list[list[int]]]:
        """Return the kept positions, `[layer][head][ascending]`."""
        return [
            [sorted(p for p in head if p >= 0) for head in layer.slots.position[row].tolist()] for layer in self.layers
        ]

    def pin(self, row: int, positions: Iterable[int], *, beside: int = 0) -> int:
        """Give the tokens at `positions` that `row` still holds the score +inf; return how many heads' slots that are.

        So many slots of each head are left to others that are pinned for a time: `beside`, and the newest.

        Raises:
            UsageError: some head would have no other slot left; nothing is pinned.
        """
        wanted = torch.tensor(sorted(positions), dtype=torch.int32, device=self.layers[0].slots.position.device)
        chosen = [torch.isin(layer.slots.position[row], wanted) for layer in self.layers]
        for layer, mask in zip(self.layers, chosen, strict=True):
            if _holds_window(layer, self.kv_budget):
                continue
            most = int((mask | (layer.slots.log_beta[row] == torch.inf)).sum(-1).max())
            most += self.recent + beside
            if most >= layer.size:
                raise UsageError(
                    f"{most} pinned tokens leave none of {layer.size} slots per head to the others", hint="pin less"
                )
        for layer, mask in zip(self.layers, chosen, strict=True):
            layer.slots.log_beta[row].masked_fill_(mask, torch.inf)
        return sum(int(mask.sum()) for mask in chosen)

    def check_pins(self, kv_budget: int, rows: Sequence[int], *, beside: int = 0) -> None:
        """Raise when some head of `rows` has so many pinned tokens that a size leaves no slot for others.

        Raises:
            UsageError: that size.
        """
        for layer in self.layers:
            if _holds_window(layer, kv_budget):
                continue
            pinned = (layer.slots.log_beta[list(rows)] == torch.inf).sum(-1)
            most = self.recent + beside + (int(pinned.max()) if rows else 0)
            if most >= kv_budget:
                raise UsageError(
                    f"{most} tokens are pinned: {kv_budget} slots per head leave none to the others",
                    hint=f"{most + 1} slots or more",
                )

    def protect(self, row: int, *spans: tuple[int, int]) -> None:
        """Keep what `row` holds, or is fed, at positions in up to two half-open intervals, until others are named."""
        assert self.spans is not None, "made to protect nothing"
        named = [*spans, (0, 0), (0, 0)][:2]
        self.spans[row].copy_(torch.tensor(named, dtype=torch.int32), non_blocking=True)

    def ages(self, row: int) -> torch.Tensor:
        """Return the ages in tokens of all that `row` keeps, in ascending order, in host memory."""
        positions = torch.cat([layer.slots.position[row].flatten() for layer in self.layers]).cpu()
        return (self.seen[row] - positions[positions >= 0]).sort().values

    def retained(self, row: int) -> Retained:
        """Return what every layer and head holds of `row`, with the lowest score of each head that is full."""
        spans = () if self.spans is None else tuple((a, b) for a, b in self.spans[row].tolist() if a < b)
        layers = (_remembered(layer, row, self.seen[row], spans) for layer in self.layers)
        return Retained(seen=self.seen[row], layers=tuple(layers))

    def kept_per_head(self, row: int) -> int:
        """Return the slots in use per head of the largest layer."""
        return max(self._used(row, index) for index in range(len(self.layers)))

    def evicted(self, row: int) -> int:
        """Count the tokens lost so far, over all layers and heads."""
        heads = self.layers[0].slots.position.shape[1]
        return sum(self.seen[row] - self._used(row, index) for index in range(len(self.layers))) * heads

    def _used(self, row: int, index: int) -> int:
        return min(self.seen[row] - self._missing[index][row], self.layers[index].size)


def _size(kv_budget: int, window: int | None) -> int:
    return kv_budget if window is None else min(kv_budget, window)


def _holds_window(layer: LayerCache, kv_budget: int) -> bool:
    """Tell whether a layer has a slot for all that its window shows, so that nothing competes."""
    return layer.window is not None and layer.window <= kv_budget


def _resized(layer: LayerCache, size: int, seen: Tensor, spans: Tensor | None) -> LayerCache:
    """Return a layer with another number of slots, which holds the best of the old ones."""
    old, count = layer.slots, min(size, layer.size)
    how: dict[str, Any] = {"seen": seen, "window": layer.window, "spans": spans, **layer.ranks}
    taken = old.taken(best(old, count, **how)) if count < layer.size else old
    rows, heads, _, head_dim = old.key.shape
    made = Slots.empty(
        rows=rows, num_kv_heads=heads, slots=size, head_dim=head_dim, dtype=old.key.dtype, device=old.key.device
    )
    for new, kept in zip(made.head(count), taken, strict=True):
        new.copy_(kept)
    return replace(layer, slots=made, journal=Journal.beside(made))


def _at_most(saved: Slots, layer: LayerCache, seen: int, spans: Tensor | None = None) -> Slots:
    """Return the best of a saved row that a layer has slots for."""
    if saved.position.shape[2] <= layer.size:
        return saved
    fed = torch.tensor([seen], dtype=torch.int32)
    return saved.taken(best(saved, layer.size, seen=fed, window=layer.window, spans=spans, **layer.ranks))


def _make_pools(
    windows: Sequence[int | None], sizes: Sequence[int], ranks: Mapping[str, Any], shape: Mapping[str, Any]
) -> dict[int | None, SlotPool]:
    """Allocate the layers of each window together."""
    return {
        window: SlotPool(layers=windows.count(window), slots=size, window=window, **ranks, **shape)
        for window, size in dict(zip(windows, sizes, strict=True)).items()
    }


def _make_states(shape: StateShape, rows: int, device: torch.device) -> tuple[LinearState, ...]:
    conv, recurrent = (shape.channels, shape.kernel), (shape.value_heads, shape.key_dim, shape.value_dim)
    return tuple(
        LinearState.empty(rows=rows, conv=conv, recurrent=recurrent, device=device) for _ in range(shape.layers)
    )


def _remembered(layer: LayerCache, row: int, seen: int, spans: tuple[tuple[int, int], ...]) -> LayerMemory:
    positions, log_betas = layer.slots.position[row].cpu(), layer.slots.log_beta[row].cpu()  # [Hkv, M]
    first = 0 if layer.window is None else max(0, seen - layer.window)
    heads = []
    for position, log_beta in zip(positions, log_betas, strict=True):
        held = (position >= first).nonzero()[:, 0]
        held = held[position[held].argsort()]
        ages = (seen + 1 - position[held]).float()
        scores = log_beta[held] if layer.static else log_beta[held] * ages
        scores = scores.masked_fill(position[held] >= seen - layer.recent, torch.inf)
        for first_protected, end in spans:
            inside = (position[held] >= first_protected) & (position[held] < end)
            scores = scores.masked_fill(inside, torch.inf)
        heads.append(
            HeadMemory(
                positions=tuple(position[held].tolist()),
                log_beta=tuple(log_beta[held].tolist()),
                threshold=float(scores.min()) if len(held) == layer.size else None,
            )
        )
    return LayerMemory(
        slots=layer.size,
        window=layer.window,
        recent=layer.recent,
        static=layer.static,
        protected=spans,
        heads=tuple(heads),
    )
