"""Decoding one step ahead of the host: the device feeds what it has sampled, and the host reads it one step behind.

Everything that decides the next step lies on the device, in `DeviceRows`. Nothing is fed or evicted after a row's last
token where the device knows it for that. Where only the host sees an end (a stop string), what was fed behind it is
taken back. Where it has to know a token before the next one is chosen (grammars, budgets of reasoning), all rows run in
step: the same forward, and nothing ahead of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from trimkv_cli.cache.retention_cache import RetentionCache
from trimkv_cli.cache.transfers import to_device
from trimkv_cli.engine.device_rows import DeviceRows, Forward
from trimkv_cli.engine.graphs import Graphs
from trimkv_cli.engine.sampler import NO_TOKEN, Logprobs, Sampler
from trimkv_cli.engine.scheduler import Row
from trimkv_cli.errors import is_out_of_memory


@dataclass(frozen=True, slots=True)
class _Host:
    """Where the tokens of a step arrive on the host, allocated once, and the event that says so."""

    tokens: Tensor
    done: Any  # a CUDA event

    @classmethod
    def empty(cls, rows: int) -> Self:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return cls(torch.empty(rows, dtype=torch.int64, pin_memory=True), event)


@dataclass(frozen=True, slots=True)
class _Launch:
    """A step on its way: its rows, and what it brought, on the host once `done`."""

    rows: tuple[Row, ...]
    places: tuple[int, ...]  # of these rows in `tokens`
    tokens: Tensor
    logprobs: Logprobs | None
    done: Any  # a CUDA event; None where nothing is asynchronous

    def has(self, row: Row) -> bool:
        return _among(row, self.rows)

    def wait(self) -> list[int]:
        """Return the tokens once they are there, and leave their log probabilities at the rows."""
        if self.done is not None:
            self.done.synchronize()
        arrived: list[int] = self.tokens.tolist()
        tokens = [arrived[place] for place in self.places]
        logprobs = {} if self.logprobs is None else self.logprobs.read()
        for number, row in enumerate(self.rows):
            row.logprob = logprobs.get(number)
        return tokens


class Ahead:
    """Own the step that is on its way, and know which rows the device knows."""

    def __init__(
        self,
        forward: Forward,
        sampler: Sampler,
        cache: RetentionCache,
        *,
        eos_token_ids: Collection[int],
        graphed: bool,
    ) -> None:
        rows, device = sampler.max_rows, sampler.device
        self._sampler = sampler
        self._cache = cache
        self._device = DeviceRows(forward, sampler, rows=rows, eos_token_ids=eos_token_ids, graphed=graphed)
        self._ends = frozenset(eos_token_ids)
        self._known: dict[int, Row] = {}  # as the device has them, by index
        self._pending: _Launch | None = None
        # One is read while the next step fills the other.
        self._hosts = deque(_Host.empty(rows) for _ in range(2)) if device.type == "cuda" else None

    @property
    def graphs(self) -> Graphs | None:
        """What was captured of the steps; None where nothing is."""
        return self._device.graphs

    def step(self, rows: Sequence[Row], *, in_step: bool = False) -> list[tuple[Row, int]]:
        """Return the next token of the rows that have one by now; with `in_step` nothing is fed beyond that."""
        free = not in_step and not any(self._sampler.must_be_told(row.index) for row in rows)
        pending = self._take_pending(rows)
        self._tell(rows)
        current = pending or self._launch(rows)
        going_on = [row for row in rows if _left(row) > current.has(row)] if free else []
        failed = bool(going_on) and not self._launch_ahead(going_on)
        ready = [(row, token) for row, token in zip(current.rows, current.wait(), strict=True) if _among(row, rows)]
        for row, token in ready:
            if token != NO_TOKEN:
                self._sampler.advance(row.index, token)
        if failed:
            self._take_back(going_on, {row.index: token for row, token in ready})
        return ready

    def leave(self, row: Row) -> None:
        """Take back what was fed ahead to a row that has ended; nothing was where the device saw the end."""
        if self._pending is not None and self._pending.has(row) and not self._saw_end(row):
            self._undo({row.index: row.seen})
        if self._known.pop(row.index, None) is not None:
            self._device.end([row.index])

    def _saw_end(self, row: Row) -> bool:
        """Tell whether the device knew a row's last token for its end."""
        return bool(row.output) and row.output[-1] in self._ends and not row.request.params.ignore_eos

    def forget(self) -> None:
        """Take nothing for known: the host says everything anew."""
        self._pending = None
        self._known.clear()
        self._device.position.fill_(-1)

    def undo_pending(self) -> None:
        """Take back what was fed ahead, as something else will happen to these rows."""
        if self._pending is not None:
            self._take_back([row for row in self._pending.rows if self._known.get(row.index) is row], {})
        self.forget()

    def _take_pending(self, rows: Sequence[Row]) -> _Launch | None:
        """Return the step on its way, if it has any of these rows; others that it has, and that live, wait."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        waiting = [row for row in pending.rows if self._known.get(row.index) is row and not _among(row, rows)]
        if waiting:
            self._take_back(waiting, {})
        return pending if any(pending.has(row) for row in rows) else None

    def _launch_ahead(self, rows: Sequence[Row]) -> bool:
        try:
            self._pending = self._launch(rows)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return False  # the step before is safe: it is tried again in step, where that is undone
        return True

    def _take_back(self, rows: Sequence[Row], tokens: Mapping[int, int]) -> None:
        """Undo the last step of rows; `tokens` are those that the host is about to append to them."""
        self._undo({row.index: row.seen + (row.index in tokens) for row in rows})
        for row in rows:
            output = [*row.output, *([tokens[row.index]] if row.index in tokens else [])]
            prompt = (*row.history, *row.request.prompt_token_ids)
            self._sampler.set_row(row.index, row.request.params, prompt)
            self._sampler.replay(row.index, output)
            self._known.pop(row.index, None)
        self._device.end([row.index for row in rows])

    def _undo(self, positions: Mapping[int, int]) -> None:
        self._cache.undo_decode([positions.get(index, -1) for index in range(len(self._device))])

    def move(self, source: int, target: int) -> None:
        """Follow a row to another place."""
        self._device.move(source, target)
        row = self._known.pop(source, None)
        if row is not None:
            self._known[target] = row

    def _tell(self, rows: Sequence[Row]) -> None:
        """Write to the device what it does not know: rows that are new here, and rows that are gone."""
        here = {row.index: row for row in rows}
        gone = [index for index, row in self._known.items() if here.get(index) is not row]
        new = [row for row in rows if self._known.get(row.index) is not row]
        self._known = here
        self._device.end(gone)
        if new:
            self._device.tell(
                [row.index for row in new],
                ids=[row.output[-1] for row in new],
                seen=[row.seen for row in new],
                left=[_left(row) for row in new],
                watch=[not row.request.params.ignore_eos for row in new],
            )

    @torch.inference_mode()
    def _launch(self, rows: Sequence[Row]) -> _Launch:
        """Start one step of these rows; nothing here waits for the device."""
        places = tuple(row.index for row in rows)
        form = self._sampler.form(places)
        logits = self._device.feed(max(places) + 1)
        tokens = self._choose(logits, places) if form is None else self._device.choose(logits, form)
        logprobs = self._sampler.logprobs(logits, places, tokens, places)
        if self._hosts is None:
            return _Launch(tuple(rows), places, tokens.clone(), logprobs, None)
        self._hosts.rotate()
        host = self._hosts[0].tokens[: len(tokens)].copy_(tokens, non_blocking=True)
        self._hosts[0].done.record()
        return _Launch(tuple(rows), places, host, logprobs, self._hosts[0].done)

    def _choose(self, logits: Tensor, places: Sequence[int]) -> Tensor:
        """Choose tokens where the host has a say in it; others than those of `places` have no meaning."""
        at = to_device(places, self._sampler.device)
        tokens = logits.new_zeros(len(logits), dtype=torch.int64)
        tokens[at] = self._sampler(logits[at], places)
        self._device.take(tokens)
        return tokens


def _among(row: Row, rows: Sequence[Row]) -> bool:
    return any(row is other for other in rows)


def _left(row: Row) -> int:
    """Count the tokens that a row may still get, as the host knows it."""
    return row.request.params.max_tokens - len(row.output)
