"""Decoding one step ahead of the host: the device feeds what it has sampled, and the host reads it one step behind.

Everything that decides the next step lies on the device: ids, positions, how many tokens a row may still get, and which
tokens end it. A row that has ended there is at position −1: nothing is fed or evicted after its last token. Where only
the host sees an end (a stop string), what was fed behind it is taken back. Where it has to know a token before the next
one is chosen (grammars, budgets of reasoning), all rows run in step: the same forward, and nothing ahead of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from trimkv_cli.cache.retention_cache import RetentionCache
from trimkv_cli.engine.graphs import Forward
from trimkv_cli.engine.sampler import NO_TOKEN, Logprobs, Sampler, to_device
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
    tokens: Tensor  # [rows]
    logprobs: Logprobs | None
    done: Any  # a CUDA event; None where nothing is asynchronous

    def has(self, row: Row) -> bool:
        return _among(row, self.rows)

    def wait(self) -> list[int]:
        """Return the tokens once they are there, and leave their log probabilities at the rows."""
        if self.done is not None:
            self.done.synchronize()
        tokens: list[int] = self.tokens.tolist()
        logprobs = {} if self.logprobs is None else self.logprobs.read()
        for place, row in enumerate(self.rows):
            row.logprob = logprobs.get(place)
        return tokens


class Ahead:
    """Own the device's view of the rows that decode."""

    def __init__(
        self, forward: Forward, sampler: Sampler, cache: RetentionCache, *, rows: int, eos_token_ids: Collection[int]
    ) -> None:
        device = sampler.device
        self._forward = forward
        self._sampler = sampler
        self._cache = cache
        self.ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self._left = torch.zeros(rows, dtype=torch.int32, device=device)
        self._watch = torch.zeros(rows, dtype=torch.bool, device=device)
        self._ends = frozenset(eos_token_ids)
        self._eos = torch.tensor(sorted(eos_token_ids), dtype=torch.int64, device=device)
        self._known: dict[int, Row] = {}  # as the device has them, by index
        self._pending: _Launch | None = None
        # One is read while the next step fills the other.
        self._hosts = deque(_Host.empty(rows) for _ in range(2)) if device.type == "cuda" else None

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
            self.position[row.index] = -1

    def _saw_end(self, row: Row) -> bool:
        """Tell whether the device knew a row's last token for its end."""
        return bool(row.output) and row.output[-1] in self._ends and not row.request.params.ignore_eos

    def forget(self) -> None:
        """Take nothing for known: the host says everything anew."""
        self._pending = None
        self._known.clear()
        self.position.fill_(-1)

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
            self.position[row.index] = -1

    def _undo(self, positions: Mapping[int, int]) -> None:
        self._cache.undo_decode([positions.get(index, -1) for index in range(len(self.position))])

    def move(self, source: int, target: int) -> None:
        """Follow a row to another place."""
        for tensor in (self.ids, self.position, self._left, self._watch):
            tensor[target] = tensor[source]
        self.position[source] = -1
        row = self._known.pop(source, None)
        if row is not None:
            self._known[target] = row

    def _tell(self, rows: Sequence[Row]) -> None:
        """Write to the device what it does not know: rows that are new here, and rows that are gone."""
        here = {row.index: row for row in rows}
        gone = [index for index, row in self._known.items() if here.get(index) is not row]
        new = [row for row in rows if self._known.get(row.index) is not row]
        self._known = here
        if gone:
            self.position[self._on_device(gone, torch.int64)] = -1
        if new:
            at = self._on_device([row.index for row in new], torch.int64)
            self.ids[at] = self._on_device([row.output[-1] for row in new], torch.int64)
            self.position[at] = self._on_device([row.seen for row in new], torch.int32)
            self._left[at] = self._on_device([_left(row) for row in new], torch.int32)
            self._watch[at] = self._on_device([not row.request.params.ignore_eos for row in new], torch.bool)

    @torch.inference_mode()
    def _launch(self, rows: Sequence[Row]) -> _Launch:
        """Start one step of these rows; nothing here waits for the device."""
        indices = [row.index for row in rows]
        count = max(indices) + 1
        at = self._on_device(indices, torch.int64)
        logits = self._forward(self.ids, self.position, count)
        logits = logits[at]
        tokens = self._sampler(logits, indices)
        logprobs = self._sampler.logprobs(logits, indices, tokens)
        left, position = self._left[at] - 1, self.position[at]
        ended = (left <= 0) | (self._watch[at] & torch.isin(tokens, self._eos)) | (position < 0) | (tokens < 0)
        self.ids[at] = tokens.clamp(min=0)
        self._left[at] = left
        self.position[at] = torch.where(ended, -1, position + 1)
        if self._hosts is None:
            return _Launch(tuple(rows), tokens, logprobs, None)
        self._hosts.rotate()
        host = self._hosts[0].tokens[: len(indices)].copy_(tokens, non_blocking=True)
        self._hosts[0].done.record()
        return _Launch(tuple(rows), host, logprobs, self._hosts[0].done)

    def _on_device(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return to_device(values, self.ids.device, dtype)


def _among(row: Row, rows: Sequence[Row]) -> bool:
    return any(row is other for other in rows)


def _left(row: Row) -> int:
    """Count the tokens that a row may still get, as the host knows it."""
    return row.request.params.max_tokens - len(row.output)
