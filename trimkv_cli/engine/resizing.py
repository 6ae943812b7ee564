"""Another size of the cache while requests run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trimkv_cli.engine.kept_rows import KeptRows
from trimkv_cli.engine.recovery import attempt
from trimkv_cli.engine.scheduler import Row
from trimkv_cli.errors import ContextOverflow, DoesNotFit, OutOfDeviceMemory, TrimkvError, UsageError
from trimkv_cli.events import Resized
from trimkv_cli.units import format_size


class Resizing(KeptRows):
    """Change the slots per head, or the budget that they follow from."""

    def resize(self, kv_budget: int) -> Resized:
        """Change the slots per head while requests run or are kept; these go on with what the new size holds.

        Fewer slots evict by score, as it is now; more begin empty. From then on results are those of the new size.

        Raises:
            UsageError: no slot at all, none beside pinned tokens, or positions are given anew.
            DoesNotFit: more than the budget holds, old and new of what is moved at once counted.
            ContextOverflow: fewer than a full cache, which may evict nothing, holds already.
            OutOfDeviceMemory: there was not enough memory after all; the size stays as it was.
        """
        if self._runner.cache.rebase is not None:
            hint = "begin anew with another --kv-budget, or without --on-overflow rebase"
            raise UsageError("the slots are as many as they are under --on-overflow rebase", hint=hint)
        before, bytes_before, rows = self.facts.plan, self.kv_bytes, self._scheduler.begun
        plan = before.resized(kv_budget)
        self._check_full_cache(kv_budget, rows)
        self._runner.cache.check_pins(kv_budget, [row.index for row in rows])
        evicted, failure = attempt(lambda: self._runner.resize(kv_budget, rows))
        if evicted is None:
            self._runner.resize(before.kv_budget, rows)
            raise OutOfDeviceMemory(f"no memory for {kv_budget} slots per head: {failure}", hint="try fewer slots")
        self._scheduler.forget_prefix()
        self.facts = replace(self.facts, plan=plan)
        self.fingerprint = {**self.fingerprint, "kv_budget": str(kv_budget)}
        return Resized(
            kv_budget_before=before.kv_budget,
            kv_budget=kv_budget,
            evicted=evicted,
            kv_bytes_before=bytes_before,
            kv_bytes=self.kv_bytes,
        )

    def set_budget(self, budget_bytes: int) -> Resized:
        """Give the process another budget: the slots shrink where they must, or grow, to what was trained at most.

        Raises:
            DoesNotFit: no slot fits beside all the rest; nothing has changed.
            TrimkvError: as `resize`.
        """
        before = self.facts
        plan = before.plan.with_budget(budget_bytes)
        most = plan.slots_within(budget_bytes)
        if most == 0:
            raise DoesNotFit(
                f"{format_size(plan.total_bytes)} are in use, and without slots that is still above the budget",
                hint="a larger budget",
            )
        self.facts = replace(before, plan=plan)
        try:
            return self.resize(min(most, max(plan.kv_budget, before.gate.memory_size or 0)))
        except TrimkvError:
            self.facts = before
            raise

    def _check_full_cache(self, kv_budget: int, rows: Sequence[Row]) -> None:
        needed = max((self._tokens_at_end(row) for row in rows), default=0)
        if self.facts.gate.variant == "none" and needed > kv_budget:
            raise ContextOverflow(
                f"a full cache of {kv_budget} slots cannot hold the {needed} tokens of what runs or is kept",
                hint=f"{needed} slots or more, or gates: --gates streaming",
            )

    def _tokens_at_end(self, row: Row) -> int:
        if self._scheduler.parked.get(row.request.id) is row:
            return row.seen
        return row.base + len(row.request.prompt_token_ids) + row.request.params.max_tokens - 1
