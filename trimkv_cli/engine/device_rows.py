"""The rows that decode, as the device knows them, and one step of theirs that reads nothing on the host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from trimkv_cli.cache.transfers import to_device
from trimkv_cli.engine.graphs import Graphs
from trimkv_cli.engine.sampler import Form, Sampler
from trimkv_cli.plan.step import GRAPH_ROWS

Forward = Callable[
    [Tensor, Tensor, int], Tensor
]  # ids and positions of all rows, count of the first → logits [count, V]


class DeviceRows:
    """Own what each row feeds next, at which position, how many tokens it may still get, and which end it.

    A row that has ended is at position −1: nothing is fed to it. With `graphed` a step is two graphs: the forward, one
    for each number of rows, and the choice of tokens, one for each form and number of rows, so that rows which sample
    otherwise need no other graph of the model.
    """

    def __init__(
        self, forward: Forward, sampler: Sampler, *, rows: int, eos_token_ids: Collection[int], graphed: bool
    ) -> None:
        self._forward = forward
        self._sampler = sampler
        self._device = device = sampler.device
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self._left = torch.zeros(rows, dtype=torch.int32, device=device)
        self._watch = torch.zeros(rows, dtype=torch.bool, device=device)
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=torch.int64, device=device)
        self.graphs = Graphs(self.position) if graphed else None

    def __len__(self) -> int:
        return len(self.position)

    def feed(self, count: int) -> Tensor:
        """Feed at least the first `count` rows; return their logits `[≥ count, V]`, which the next step overwrites."""
        if self.graphs is not None:
            rows = next((size for size in GRAPH_ROWS if count <= size <= len(self)), len(self))
            logits = self.graphs.replay(rows, lambda: self._forward(self.ids, self.position, rows))
            if logits is not None:
                return logits
        return self._forward(self.ids, self.position, count)

    def choose(self, logits: Tensor, form: Form) -> Tensor:
        """Choose and `take` the next tokens `[B]` of the rows that were fed; the next step overwrites them."""
        rows = len(logits)
        # A graph reads where it was captured: logits that no graph has made lie elsewhere each time.
        if self.graphs is not None and rows in self.graphs:
            tokens = self.graphs.replay((form, rows), lambda: self._choose(logits, form))
            if tokens is not None:
                return tokens
        return self._choose(logits, form)

    def _choose(self, logits: Tensor, form: Form) -> Tensor:
        live = self.position[: len(logits)] >= 0
        tokens = self._sampler.choose(logits, form, live=live)
        self.take(tokens)
        return tokens

    def take(self, tokens: Tensor) -> None:
        """Take the new tokens `[B]` of the first B rows, of those that are at a position: they are fed next."""
        first = slice(len(tokens))
        ids, now, left = self.ids[first], self.position[first], self._left[first]
        live = now >= 0
        left -= live.int()
        ends = (tokens[:, None] == self._eos).any(-1) & self._watch[first]
        goes_on = live & ~ends & (left > 0) & (tokens >= 0)
        torch.where(live, tokens.clamp(min=0), ids, out=ids)
        now.add_(1).masked_fill_(~goes_on, -1)

    def tell(
        self,
        rows: Sequence[int],
        *,
        ids: Sequence[int],
        seen: Sequence[int],
        left: Sequence[int],
        watch: Sequence[bool],
    ) -> None:
        """Say of some rows which token is fed next, behind how many, how many may follow, and whether some end it."""
        at = self._tensor(rows, torch.int64)
        self.ids[at] = self._tensor(ids, torch.int64)
        self.position[at] = self._tensor(seen, torch.int32)
        self._left[at] = self._tensor(left, torch.int32)
        self._watch[at] = self._tensor(watch, torch.bool)

    def end(self, rows: Sequence[int]) -> None:
        """Feed nothing more to some rows."""
        if rows:
            self.position[self._tensor(rows, torch.int64)] = -1

    def move(self, source: int, target: int) -> None:
        """Follow a row to another place."""
        for tensor in (self.ids, self.position, self._left, self._watch):
            tensor[target] = tensor[source]
        self.position[source] = -1

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return to_device(values, self._device, dtype)
