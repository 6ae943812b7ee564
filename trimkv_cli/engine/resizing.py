"""Another size of the cache while requests run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from trimkv_cli.engine.devices import cap_allocator, give_back, reset_peak
from trimkv_cli.engine.kept_rows import KeptRows
from trimkv_cli.engine.recovery import attempt
from trimkv_cli.engine.scheduler import Row
from trimkv_cli.errors import ContextOverflow, DoesNotFit, OutOfDeviceMemory, TrimkvError, UsageError
from trimkv_cli.events import Resized
from trimkv_cli.plan.plan import Plan
from trimkv_cli.units import format_sizes


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
        return self._change(self.facts.plan, kv_budget, limit=self.facts.plan.budget_bytes)

    def set_budget(self, budget_bytes: int) -> Resized:
        """Give the process another budget: the slots shrink where they must, or grow, to what was trained at most.

        The larger of both budgets holds while slots move; peaks count from then on.

        Raises:
            DoesNotFit: no slot fits beside all the rest; nothing has changed.
            TrimkvError: as `resize`.
        """
        facts, before = self.facts, self.facts.plan.budget_bytes
        plan = facts.plan.with_budget(budget_bytes)
        limit = None if before is None else max(before, budget_bytes)
        most = plan.slots_within(budget_bytes, limit=limit)
        if most == 0:
            least = plan.with_slots(1).run.total_bytes
            needed, budget = format_sizes(least, budget_bytes)
            raise DoesNotFit(
                f"1 slot per head needs {needed}, and the budget is {budget}", hint=f"{least} bytes, or a larger budget"
            )
        device, runtime = self._runner.device, plan.run.part_bytes("runtime")
        if limit is not None:
            cap_allocator(device, limit - runtime)
        try:
            done = self._change(plan, min(most, max(plan.run.kv_budget, facts.gate.memory_size or 0)), limit=limit)
        except TrimkvError:
            cap_allocator(device, sys.maxsize if before is None else before - runtime)
            raise
        cap_allocator(device, budget_bytes - runtime)
        reset_peak(device)
        return done

    def _change(self, before: Plan, kv_budget: int, *, limit: int | None) -> Resized:
        """Change the slots per head from a plan of those that there are; raises as `resize` does."""
        if self._runner.cache.rebase is not None:
            hint = "begin anew with another --kv-budget, or without --on-overflow rebase"
            raise UsageError("the slots are as many as they are under --on-overflow rebase", hint=hint)
        bytes_before, rows = self.kv_bytes, self._scheduler.begun
        plan = before.resized(kv_budget, limit=limit)
        self._check_full_cache(kv_budget, rows)
        self._runner.cache.check_pins(kv_budget, [row.index for row in rows])
        evicted, failure = attempt(lambda: self._runner.resize(kv_budget, rows))
        if evicted is None:
            self._runner.resize(before.run.kv_budget, rows)
            raise OutOfDeviceMemory(f"no memory for {kv_budget} slots per head: {failure}", hint="try fewer slots")
        give_back(self._runner.device)
        self._scheduler.forget_prefix()
        self.facts = replace(self.facts, plan=plan)
        self.fingerprint = {**self.fingerprint, "kv_budget": str(kv_budget)}
        return Resized(
            kv_budget_before=before.run.kv_budget,
            kv_budget=kv_budget,
            evicted=evicted,
            kv_bytes_before=bytes_before,
            kv_bytes=self.kv_bytes,
        )

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
