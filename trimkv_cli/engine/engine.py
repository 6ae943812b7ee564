"""The loop: requests in, token events out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from trimkv_cli.engine.glance import Glancer
from trimkv_cli.engine.memory import measured_peaks, peak_bytes
from trimkv_cli.engine.model_runner import ModelRunner
from trimkv_cli.engine.recovery import Recovery, attempt
from trimkv_cli.engine.request import Request
from trimkv_cli.engine.scheduler import Decode, Prefill, Row, Scheduler
from trimkv_cli.engine.session import RowState
from trimkv_cli.engine.text import Detokenizer, Text
from trimkv_cli.errors import CacheMismatch, ContextOverflow, DoesNotFit, OutOfDeviceMemory, TrimkvError, UsageError
from trimkv_cli.events import CacheStats, FinishReason, Glance, RequestStats, Resized, RunStats, TokenEvent
from trimkv_cli.pins import Pins
from trimkv_cli.plan import Plan
from trimkv_cli.retained import Retained
from trimkv_cli.spec import GateSpec, ModelSpec
from trimkv_cli.units import format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What stays the same while an engine lives, and what its callers may want to know of it."""

    model_id: str
    spec: ModelSpec
    gate: GateSpec
    plan: Plan
    max_positions: int
    eos_token_ids: frozenset[int]
    sampling_defaults: Mapping[str, Any]
    notes: tuple[str, ...]  # what the user did not ask for but may like to know
    warnings: tuple[tuple[str, str], ...]  # (code, message)
    weight_bytes: int
    gate_bytes: int
    load_s: float
    pins: Pins = field(default_factory=Pins)


@dataclass(slots=True, kw_only=True)
class _Progress:
    detokenizer: Detokenizer | None
    added: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    first_token: float | None = None


class Engine:
    """Run many requests over the rows of one bounded cache, each at its own pace."""

    def __init__(
        self,
        *,
        facts: EngineFacts,
        runner: ModelRunner,
        scheduler: Scheduler,
        text: Text | None,
        fingerprint: Mapping[str, str],
        hooks: Sequence[RemovableHandle] = (),
        compact: bool = True,
    ) -> None:
        self.facts = facts
        self.text = text
        self.fingerprint = fingerprint
        self._runner = runner
        self._scheduler = scheduler
        self._hooks = hooks
        self._compact = compact
        self._glancer = Glancer(runner.cache)
        self._evicted = 0
        self._progress: dict[str, _Progress] = {}
        self._recovery = Recovery(runner, scheduler)
        self._counts = {"prefill_tokens": 0, "decode_tokens": 0, "shared_prefix_tokens": 0, "steps": 0}
        self._seconds = {Prefill: 0.0, Decode: 0.0}

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def max_rows(self) -> int:
        return self._scheduler.options.max_rows

    @property
    def kv_bytes(self) -> int:
        return self._runner.cache.nbytes

    @property
    def peak_bytes(self) -> int:
        return peak_bytes(self._runner.device)

    def measured_peaks(self) -> dict[str, int]:
        """Return the largest sizes so far by who counts them: the process, and on a GPU allocator and NVML."""
        return measured_peaks(self._runner.device)

    @property
    def stats(self) -> RunStats:
        return RunStats(
            prefill_s=self._seconds[Prefill],
            decode_s=self._seconds[Decode],
            undone_steps=self._recovery.undone_steps,
            **self._counts,
        )

    @property
    def evicted(self) -> int:
        """Count the (layer, head) slots lost so far, by requests that run and that have ended."""
        running = self._scheduler.running.values()
        return self._evicted + sum(self._runner.cache.evicted(row.index) for row in running)

    @property
    def reading(self) -> tuple[int, int]:
        """Count the prompt tokens that were read, and all there are, of the requests that still read theirs."""
        rows = [row for row in self._scheduler.running.values() if row.prefilling]
        waiting = sum(len(request.prompt_token_ids) for request in self._scheduler.waiting)
        whole = sum(len(row.request.prompt_token_ids) for row in rows)
        return sum(row.fed for row in rows), whole + waiting

    @property
    def first_token_s(self) -> float | None:
        """Return how long the oldest running request waited for its first token; None while it still does."""
        row = next(iter(self._scheduler.running.values()), None)
        progress = None if row is None else self._progress[row.request.id]
        if progress is None or progress.first_token is None:
            return None
        return progress.first_token - progress.added

    def glance(self) -> Glance | None:
        """Look at what the oldest running request's row holds; cheap, and never waits for the device."""
        row = next(iter(self._scheduler.running.values()), None)
        return None if row is None else self._glancer.take(row.index)

    def check(self, request: Request) -> None:
        """Raise when a request can never be honoured.

        Raises:
            UsageError: an empty prompt, token ids that the model does not have, or more pinned than there are slots.
            ContextOverflow: more tokens than the model has positions, or than a full cache has slots.
        """
        ids, facts = request.prompt_token_ids, self.facts
        if not ids:
            raise UsageError("the prompt is empty", hint="give at least one token")
        bad = next((i for i in ids if not 0 <= i < facts.spec.vocab_size), None)
        if bad is not None:
            size = facts.spec.vocab_size
            raise UsageError(f"token id {bad} is outside the vocabulary of {size}", hint=f"ids go from 0 to {size - 1}")
        self._runner.sampler.check(request.params)
        slots = (facts.spec.slots(layer, facts.plan.kv_budget) for layer in range(facts.spec.num_layers))
        facts.pins.check(request.prefix_len, min(slots))
        before = self._tokens_before(request)
        needed = before + len(ids) + request.params.max_tokens - 1
        asked = f"{before + len(ids)} prompt tokens + {request.params.max_tokens} to generate"
        if needed > self._positions:
            own = facts.spec.max_positions
            allowed = "" if facts.max_positions >= own else f" (its own: {own})"
            raise ContextOverflow(
                f"{asked} need {needed} positions, and {facts.model_id} has {facts.max_positions}{allowed}",
                hint="shorten the prompt or lower --max-tokens"
                if not allowed
                else "shorten the prompt, lower --max-tokens, or raise --context",
            )
        if facts.gate.variant == "none" and needed > facts.plan.kv_budget:
            raise ContextOverflow(
                f"{asked} do not fit the {facts.plan.kv_budget} slots of a cache that may evict nothing",
                hint=f"--kv-budget {needed}, or gates: --gates streaming",
            )

    def room(self, request: Request) -> int:
        """Return how many tokens may follow the request's prompt; below 1 when the prompt alone is too long."""
        facts = self.facts
        limit = min(self._positions, facts.plan.kv_budget) if facts.gate.variant == "none" else self._positions
        return limit - self._tokens_before(request) - len(request.prompt_token_ids) + 1

    @property
    def _positions(self) -> int:
        """How long a sequence may become: without an end where positions are given anew."""
        return self.facts.max_positions if self._runner.cache.rebase is None else sys.maxsize

    def _tokens_before(self, request: Request) -> int:
        parked = self._scheduler.parked.get(request.continues or "")
        return parked.seen + len(parked.unread) if parked is not None else 0

    def add(self, request: Request) -> None:
        """Queue a request; its id must not be in use."""
        self.check(request)
        assert request.id not in self._progress, f"request id {request.id!r} is in use"
        detokenizer = self.text.detokenizer(request.params.stop) if self.text is not None else None
        self._progress[request.id] = _Progress(detokenizer=detokenizer)
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Drop a request and free its row; no further event comes of it."""
        self._progress.pop(request_id, None)
        row = self._scheduler.find(request_id)
        if row is not None:
            self._runner.leave(row)
        self._scheduler.drop(request_id)

    def running_s(self, request_id: str) -> float:
        """Return how long ago a request got its row, 0 when it waits for one."""
        started = self._progress[request_id].started
        return time.perf_counter() - started if started else 0.0

    def step(self) -> list[TokenEvent]:
        """Run one prefill batch and one decode batch, and return what they brought.

        What runs out of memory is undone and tried again in a later step, smaller; a request that cannot be run alone
        either ends with the finish reason "error", and the others go on.
        """
        events = [event for move in self._scheduler.resume() for event in self._move(*move)]
        events += [event for row in self._scheduler.admit() for event in self._start(row)]
        events += [event for batch in self._scheduler.schedule() for event in self._run(batch)]
        move = self._scheduler.compact() if self._compact else None
        return events if move is None else [*events, *self._move(*move)]

    def generate(self, requests: Iterable[Request]) -> Iterator[TokenEvent]:
        """Run requests as rows become free, pulling few ahead; yield events as they come."""
        coming = iter(requests)
        while True:
            while self.num_waiting < self.max_rows and (request := next(coming, None)) is not None:
                self.add(request)
            if not self.has_work:
                return
            yield from self.step()

    def kept(self, request_id: str) -> list[list[list[int]]]:
        """Return the positions that a finished request with `keep` left in the cache: `[layer][head][ascending]`."""
        return self._runner.cache.kept(self._scheduler.parked[request_id].index)

    def retained(self, request_id: str) -> Retained:
        """Return what such a request left in the cache, with how long each token is expected to stay."""
        return self._runner.cache.retained(self._scheduler.parked[request_id].index)

    def pin(self, request_id: str, positions: Iterable[int]) -> int:
        """Never evict these tokens of such a row where heads still hold them; return the pinned ones of all heads.

        Raises:
            UsageError: they would leave some head no slot for others; nothing is pinned.
        """
        return self._runner.cache.pin(self._scheduler.parked[request_id].index, positions)

    def seen(self, request_id: str) -> int:
        """Return how many tokens the row of a finished request with `keep` has been fed."""
        return self._scheduler.parked[request_id].seen

    def token_ids(self, request_id: str) -> tuple[int, ...]:
        """Return the tokens that such a row has been fed."""
        return self._scheduler.parked[request_id].token_ids

    def unread(self, request_id: str) -> tuple[int, ...]:
        """Return the prompt tokens that such a request had not read when it was stopped."""
        return self._scheduler.parked[request_id].unread

    def kept_per_head(self, request_id: str) -> int:
        """Return how many tokens each head of such a row holds, in a layer without a window."""
        return self._runner.cache.kept_per_head(self._scheduler.parked[request_id].index)

    def save(self, request_id: str) -> RowState:
        """Copy what such a request left, so that what comes after it can be undone; its row stays as it is."""
        row = self._scheduler.parked[request_id]
        rebase = self._runner.cache.rebase
        return RowState(
            layers=self._runner.cache.save_row(row.index),
            rebased=None if rebase is None else rebase.save(row.index),
            token_ids=row.token_ids,
            unread=row.unread,
            last_token=row.output[-1] if row.output else None,
            long_rope=row.long_rope,
        )

    def restore(self, state: RowState, request_id: str) -> None:
        """Put a saved state into a free row, as if `request_id` had left it there; a later request `continues` it.

        Any number of rows may come from one state. At least one row must be free: neither running nor kept.

        Raises:
            CacheMismatch: its tokens have new positions, and here nothing gives any.
        """
        if state.rebased is not None and self._runner.cache.rebase is None:
            raise CacheMismatch("what was saved has outgrown the model's positions", hint="--on-overflow rebase")
        request = Request(id=request_id, prompt_token_ids=state.unread, keep=True)
        row = self._scheduler.park(
            request, history=state.token_ids, last_token=state.last_token, long_rope=state.long_rope
        )
        self._runner.cache.load_row(row.index, state.layers, seen=row.seen)
        if state.rebased is not None:
            assert self._runner.cache.rebase is not None
            self._runner.cache.rebase.load(row.index, state.rebased)

    def horizon(self, request_id: str) -> tuple[int, int]:
        """Return the median and the 95th percentile of the age, in tokens, of what such a request left in the cache."""
        ages = self._runner.cache.ages(self._scheduler.parked[request_id].index)
        return (int(ages[len(ages) // 2]), int(ages[len(ages) * 95 // 100])) if len(ages) else (0, 0)

    def release(self, request_id: str) -> None:
        """Free the row of a finished request with `keep`."""
        self._scheduler.drop(request_id)

    def stop(self, request_id: str) -> TokenEvent | None:
        """End a running request now, as if it had reached its length; None when it is not running."""
        row = self._scheduler.find(request_id)
        if row is None:
            return None
        detokenizer = self._progress[request_id].detokenizer
        text = detokenizer.finish() if detokenizer is not None else ""
        return TokenEvent(request_id=request_id, text=text, finish_reason="abort", stats=self._finish(row))

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

    def close(self) -> None:
        """Take the gates out of the model, so that another engine can be assembled around it; this one is done."""
        for hook in self._hooks:
            hook.remove()

    def start_trace(self) -> None:
        """Remember log_beta of every token from now on; meant for one request at a time."""
        self._runner.trace = [[] for _ in self._runner.cache.layers]

    def traced_log_beta(self) -> list[list[list[float]]]:
        """Return what was remembered since `start_trace`: `[layer][head][token]`."""
        assert self._runner.trace is not None, "start_trace comes first"
        return [torch.cat(steps, dim=2)[0].tolist() for steps in self._runner.trace]

    def _move(self, source: int, target: int) -> list[TokenEvent]:
        for _ in range(2):  # the source stays whole until all is copied
            _, failure = attempt(lambda: self._runner.move(source, target))
            if failure is None:
                return []
        return [self._give_up(self._scheduler.running[target], failure or "")]

    def _start(self, row: Row) -> list[TokenEvent]:
        self._progress[row.request.id].started = time.perf_counter()
        for _ in range(2):
            _, failure = attempt(lambda: self._runner.start(row))
            if failure is None:
                return []
        return [self._give_up(row, failure or "")]

    def _run(self, batch: Prefill | Decode) -> list[TokenEvent]:
        started = time.perf_counter()
        tokens, failure = attempt(lambda: self._runner.run(batch))
        if tokens is None:
            return [self._give_up(row, failure or "") for row in self._recovery.undo(batch)]
        self._seconds[type(batch)] += time.perf_counter() - started
        self._counts["steps"] += 1
        if isinstance(batch, Prefill):
            self._counts["prefill_tokens"] += sum(len(chunk.token_ids) for chunk in batch.chunks)
        else:
            self._counts["decode_tokens"] += len(tokens)
        return [self._accept(row, token) for row, token in tokens]

    def _accept(self, row: Row, token: int) -> TokenEvent:
        """Append a token to its sequence and say what came of it."""
        request, progress = row.request, self._progress[row.request.id]
        row.output.append(token)
        row.failures, row.saved = 0, None
        logprobs = () if row.logprob is None else (row.logprob,)
        if progress.first_token is None:
            progress.first_token = time.perf_counter()
        ends = token in self.facts.eos_token_ids and not request.params.ignore_eos
        detokenizer = progress.detokenizer
        text = detokenizer.push(token) if detokenizer is not None and not ends else ""
        stopped = detokenizer is not None and detokenizer.stopped
        reason: FinishReason | None = None
        if ends or stopped:
            reason = "stop"
        elif len(row.output) == request.params.max_tokens:
            reason = "length"
        error = self._runner.sampler.failure(row.index)
        if reason is None and error is not None:
            reason = "error"
        if reason is None:
            return TokenEvent(request_id=request.id, token_ids=(token,), text=text, logprobs=logprobs)
        if detokenizer is not None and not stopped:
            text += detokenizer.finish()
        return TokenEvent(
            request_id=request.id,
            token_ids=(token,),
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            stats=self._finish(row),
            error=error if reason == "error" else None,
        )

    def _give_up(self, row: Row, reason: str) -> TokenEvent:
        """End a request that there is no memory for; what it had before its first token is as it was."""
        detokenizer = self._progress[row.request.id].detokenizer
        text = detokenizer.finish() if detokenizer is not None and row.output else ""
        return TokenEvent(
            request_id=row.request.id,
            text=text,
            finish_reason="error",
            stats=self._finish(row, begun=bool(row.output)),
            error=f"out of memory with everything else given up: {reason}",
            error_code="out_of_memory",
        )

    def _finish(self, row: Row, *, begun: bool = True) -> RequestStats:
        self._runner.leave(row)
        if begun:
            self._scheduler.finish(row)
        else:
            self._scheduler.give_up(row)
        self._counts["shared_prefix_tokens"] += row.shared
        progress, now, cache = self._progress.pop(row.request.id), time.perf_counter(), self._runner.cache
        self._evicted += cache.evicted(row.index)
        return RequestStats(
            prompt_tokens=len(row.request.prompt_token_ids),
            completion_tokens=len(row.output),
            shared_prefix_tokens=row.shared,
            queue_s=progress.started - progress.added,
            ttft_s=None if progress.first_token is None else progress.first_token - progress.added,
            total_s=now - progress.added,
            cache=CacheStats(
                seen_tokens=row.seen,
                kept_per_head=cache.kept_per_head(row.index),
                evicted=cache.evicted(row.index),
            ),
            prefill_chunk=row.chunk,
        )
