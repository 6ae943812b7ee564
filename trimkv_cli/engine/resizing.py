"""The number of slots per head, changed while requests run or are kept."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trimkv_cli.engine.devices import cap_allocator, give_back, reset_peak
from trimkv_cli.engine.model_runner import ModelRunner
from trimkv_cli.engine.recovery import attempt
from trimkv_cli.engine.scheduler import Row, Scheduler
from trimkv_cli.errors import ContextOverflow, DoesNotFit, OutOfDeviceMemory, TrimkvError, UsageError
from trimkv_cli.events import Resized
from trimkv_cli.plan.plan import Plan
from trimkv_cli.units import format_sizes


class Resizing:
    """Change the slots per head of all rows, within the budget of a plan; each change returns the plan from then on."""

    def __init__(self, runner: ModelRunner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler

    def to_slots(self, plan: Plan, kv_budget: int) -> tuple[Plan, Resized]:
        """Change the slots within the plan's budget.

        Raises:
            TrimkvError: as `Engine.resize`; the slots stay as they were.
        """
        return self._change(plan, kv_budget, limit=plan.budget_bytes)

    def to_budget(self, plan: Plan, budget_bytes: int) -> tuple[Plan, Resized]:
        """Change budget and slots: fewer where they must be, else more, up to what was trained.

        Raises:
            TrimkvError: as `Engine.set_budget`; budget and slots stay as they were.
        """
        before, plan = plan.budget_bytes, plan.with_budget(budget_bytes)
        limit = None if before is None else max(before, budget_bytes)
        most = plan.slots_within(budget_bytes, limit=limit)
        if most == 0:
            least = plan.with_slots(1).run.total_bytes
            needed, budget = format_sizes(least, budget_bytes)
            raise DoesNotFit(
                f"1 slot per head needs {needed}, and the budget is {budget}", hint=f"{least} bytes, or a larger budget"
            )
        device, runtime = self._runner.device, plan.run.part_bytes("runtime")
        trained = plan.run.gate.memory_size or 0
        if limit is not None:
            cap_allocator(device, limit - runtime)
        try:
            changed = self._change(plan, min(most, max(plan.run.kv_budget, trained)), limit=limit)
        except TrimkvError:
            cap_allocator(device, sys.maxsize if before is None else before - runtime)
            raise
        cap_allocator(device, budget_bytes - runtime)
        reset_peak(device)
        return changed

    def _change(self, before: Plan, kv_budget: int, *, limit: int | None) -> tuple[Plan, Resized]:
        cache, rows = self._runner.cache, self._scheduler.begun
        if cache.rebase is not None:
            hint = "begin anew with another --kv-budget, or without --on-overflow rebase"
            raise UsageError("the slots are as many as they are under --on-overflow rebase", hint=hint)
        bytes_before = cache.nbytes
        plan = before.resized(kv_budget, limit=limit)
        if plan.run.gate.variant == "none":
            self._check_full_cache(kv_budget, rows)
        beside = self._runner.pinned_beside(kv_budget, rows)
        cache.check_pins(kv_budget, [row.index for row in rows], beside=beside)
        evicted, failure = attempt(lambda: self._runner.resize(kv_budget, rows))
        if evicted is None:
            self._runner.resize(before.run.kv_budget, rows)
            raise OutOfDeviceMemory(f"no memory for {kv_budget} slots per head: {failure}", hint="try fewer slots")
        give_back(self._runner.device)
        self._scheduler.forget_prefix()
        return plan, Resized(
            kv_budget_before=before.run.kv_budget,
            kv_budget=kv_budget,
            evicted=evicted,
            kv_bytes_before=bytes_before,
            kv_bytes=cache.nbytes,
        )

    def _check_full_cache(self, kv_budget: int, rows: Sequence[Row]) -> None:
        needed = max((self._tokens_at_end(row) for row in rows), default=0)
        if needed > kv_budget:
            raise ContextOverflow(
                f"a full cache of {kv_budget} slots cannot hold the {needed} tokens of what runs or is kept",
                hint=f"{needed} slots or more, or gates: --gates streaming",
            )

    def _tokens_at_end(self, row: Row) -> int:
        if self._scheduler.parked.get(row.request.id) is row:
            return row.seen
        return row.base + len(row.request.prompt_token_ids) + row.request.params.max_tokens - 1
