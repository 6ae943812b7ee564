"""Rows that finished requests with `keep` left: to read, to save, to go on from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from trimkv_cli.cache.retention_cache import SavedRow
from trimkv_cli.engine.model_runner import ModelRunner
from trimkv_cli.engine.row_files import RowState
from trimkv_cli.engine.scheduler import Scheduler
from trimkv_cli.errors import CacheMismatch
from trimkv_cli.events import Retained
from trimkv_cli.request import Request


class KeptRows:
    """Reach the row of a finished request by the request's id, until it is released or continued."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._cache = runner.cache
        self._scheduler = scheduler

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._scheduler.parked

    def positions(self, request_id: str) -> list[list[list[int]]]:
        """Return the positions that a finished request with `keep` left in the cache: `[layer][head][ascending]`."""
        return self._cache.kept(self._scheduler.parked[request_id].index)

    def retained(self, request_id: str) -> Retained:
        """Return what such a request left in the cache, with how long each token is expected to stay."""
        return self._cache.retained(self._scheduler.parked[request_id].index)

    def pin(self, request_id: str, positions: Iterable[int]) -> int:
        """Never evict these tokens of such a row where heads still hold them; return the pinned ones of all heads.

        Raises:
            UsageError: they would leave some head no slot for others; nothing is pinned.
        """
        row = self._scheduler.parked[request_id]
        beside = self._runner.pinned_beside(self._cache.kv_budget, [row])
        return self._cache.pin(row.index, positions, beside=beside)

    def seen(self, request_id: str) -> int:
        """Return how many tokens the row of a finished request with `keep` has been fed."""
        return self._scheduler.parked[request_id].seen

    def token_ids(self, request_id: str) -> tuple[int, ...]:
        """Return the tokens that such a row has been fed."""
        return self._scheduler.parked[request_id].token_ids

    def unread(self, request_id: str) -> tuple[int, ...]:
        """Return the prompt tokens that such a request had not read when it was stopped."""
        return self._scheduler.parked[request_id].unread

    def per_head(self, request_id: str) -> int:
        """Return how many tokens each head of such a row holds, in a layer without a window."""
        return self._cache.kept_per_head(self._scheduler.parked[request_id].index)

    def horizon(self, request_id: str) -> tuple[int, int]:
        """Return the median and the 95th percentile of the age, in tokens, of what such a request left in the cache."""
        ages = self._cache.ages(self._scheduler.parked[request_id].index)
        return (int(ages[len(ages) // 2]), int(ages[len(ages) * 95 // 100])) if len(ages) else (0, 0)

    def save(self, request_id: str) -> RowState:
        """Copy what such a request left, so that what comes after it can be undone; its row stays as it is."""
        row = self._scheduler.parked[request_id]
        rebase, saved = self._cache.rebase, self._cache.save_row(row.index)
        return RowState(
            layers=saved.layers,
            states=saved.states,
            rebased=None if rebase is None else rebase.save(row.index),
            token_ids=row.token_ids,
            unread=row.unread,
            last_token=row.output[-1] if row.output else None,
            long_rope=row.long_rope,
            prompt=row.prompt,
        )

    def restore(self, state: RowState, request_id: str) -> None:
        """Put a saved state into a free row, as if `request_id` had left it there; a later request `continues` it.

        Any number of rows may come from one state. At least one row must be free: neither running nor kept.

        Raises:
            CacheMismatch: its tokens have new positions, and here nothing gives any.
        """
        if state.rebased is not None and self._cache.rebase is None:
            raise CacheMismatch("what was saved has outgrown the model's positions", hint="--on-overflow rebase")
        request = Request(id=request_id, prompt_token_ids=state.unread, keep=True)
        row = self._scheduler.park(
            request,
            history=state.token_ids,
            prompt=state.prompt,
            last_token=state.last_token,
            long_rope=state.long_rope,
        )
        self._runner.protect(row)
        self._cache.load_row(row.index, SavedRow(state.layers, state.states), seen=row.seen)
        if state.rebased is not None:
            assert self._cache.rebase is not None
            self._cache.rebase.load(row.index, state.rebased)

    def fitted(self, state: RowState) -> RowState:
        """Return what of a saved state the slots hold now: of more than there are, the best."""
        spans = self._runner.protected_by(state.prompt)
        return replace(state, layers=self._cache.fitted(state.layers, seen=len(state.token_ids), spans=spans))

    def release(self, request_id: str) -> None:
        """Free the row of a finished request with `keep`."""
        self._scheduler.drop(request_id)
