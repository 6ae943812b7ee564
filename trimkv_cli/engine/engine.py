"""The loop: requests in, token events out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from trimkv_cli.engine.devices import measured_peaks, peak_bytes
from trimkv_cli.engine.facts import EngineFacts
from trimkv_cli.engine.kept_rows import KeptRows
from trimkv_cli.engine.model_runner import ModelRunner
from trimkv_cli.engine.recovery import Recovery, attempt
from trimkv_cli.engine.resizing import Resizing
from trimkv_cli.engine.sampler import NO_TOKEN
from trimkv_cli.engine.scheduler import Decode, Prefill, Row, Scheduler
from trimkv_cli.engine.snapshot import CacheSnapshots
from trimkv_cli.engine.text import Detokenizer, Text
from trimkv_cli.engine.thoughts import Thought
from trimkv_cli.errors import ContextOverflow, UsageError
from trimkv_cli.events import (
    CacheSnapshot,
    CacheStats,
    ErrorCode,
    FinishReason,
    RequestStats,
    Resized,
    RunStats,
    TokenEvent,
)
from trimkv_cli.plan.plan import Plan
from trimkv_cli.request import Request, check_token_ids


@dataclass(slots=True, kw_only=True)
class RequestState:
    """What the engine remembers of a request beside its row."""

    detokenizer: Detokenizer | None
    thought: Thought | None = None
    added: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    first_token: float | None = None


class Engine:
    """Run many requests over the rows of one bounded cache, each at its own pace.

    `kept` is what finished requests left in their rows.
    """

    def __init__(
        self,
        *,
        facts: EngineFacts,
        runner: ModelRunner,
        scheduler: Scheduler,
        text: Text | None,
        fingerprint: Mapping[str, str],
        undo: ExitStack,
        compact: bool = True,
    ) -> None:
        self.facts = facts
        self.text = text
        self.fingerprint = fingerprint
        self.kept = KeptRows(runner, scheduler)
        self._runner = runner
        self._scheduler = scheduler
        self._recovery = Recovery(runner, scheduler)
        self._resizing = Resizing(runner, scheduler)
        self._snapshots = CacheSnapshots(runner.cache)
        self._undo = undo
        self._compact = compact
        self._states: dict[str, RequestState] = {}
        self._counts = {"prefill_tokens": 0, "decode_tokens": 0, "shared_prefix_tokens": 0, "steps": 0}
        self._seconds = {Prefill: 0.0, Decode: 0.0}
        self._evicted = 0

    def add(self, request: Request) -> None:
        """Queue a request; its id must not be in use."""
        self.check(request)
        assert request.id not in self._states, f"request id {request.id!r} is in use"
        detokenizer = self.text.detokenizer(request.params.stop, shown=request.shown) if self.text else None
        self._states[request.id] = RequestState(detokenizer=detokenizer)
        self._scheduler.add(request)

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

    def log_likelihoods(self, request: Request) -> list[float]:
        """Read a prompt, chunk by chunk as ever, and return the log probability of each of its tokens but the first.

        Nothing else may be running. Raises as `check` does.
        """
        self.check(request)
        assert not self.has_work, "a text is read alone"
        self._scheduler.add(request)
        (row,) = self._scheduler.admit()
        self._runner.start(row)
        found: list[float] = []
        before: torch.Tensor | None = None  # the logits behind the last token of the chunk before
        while row.prefilling:
            chunk = self._scheduler.cut(row, row.fed)
            logits = self._runner.read(chunk).float()
            ids = torch.tensor(chunk.token_ids, device=logits.device)
            first = logits[:0] if before is None else before[None]
            ids, before = ids[1 - len(first) :], logits[-1]
            scores = torch.cat([first, logits[:-1]]).log_softmax(-1)
            found += scores.gather(1, ids[:, None])[:, 0].tolist()
        self._scheduler.drop(request.id)
        return found

    def stop(self, request_id: str) -> TokenEvent | None:
        """End a running request now, as if it had reached its length; None when it is not running."""
        row = self._scheduler.find(request_id)
        if row is None:
            return None
        detokenizer = self._states[request_id].detokenizer
        text = detokenizer.finish() if detokenizer is not None else ""
        return TokenEvent(request_id=request_id, text=text, finish_reason="abort", stats=self._finish(row))

    def abort(self, request_id: str) -> None:
        """Drop a request and free its row; no further event comes of it."""
        self._states.pop(request_id, None)
        row = self._scheduler.find(request_id)
        if row is not None:
            self._runner.leave(row)
        self._scheduler.drop(request_id)

    def close(self) -> None:
        """Give the model and its gates back as they were, and the memory of graphs; this engine is done."""
        self._runner.close()
        self._undo.close()

    def check(self, request: Request) -> None:
        """Raise when a request can never be honoured.

        Raises:
            UsageError: an empty prompt, token ids that the model does not have, or more pinned than there are slots.
            ContextOverflow: more tokens than the model has positions, or than a full cache has slots.
        """
        ids, facts = request.prompt_token_ids, self.facts
        if not ids:
            raise UsageError("the prompt is empty", hint="give at least one token")
        check_token_ids(ids, facts.spec.vocab_size)
        self._runner.sampler.check(request.params)
        turns = request.continues is not None and not request.goes_on
        facts.pins.check(request.prefix_len, facts.plan.run.kv_budget, sinks=facts.gate.kept, turns=turns)
        before = self._tokens_before(request)
        needed = before + len(ids) + request.params.max_tokens - 1
        param = "max_tokens" if self.room(request) >= 1 else None  # else the prompt alone is too long
        asked = f"{before + len(ids)} prompt tokens + {request.params.max_tokens} to generate"
        if needed > self._positions:
            own = facts.spec.max_positions
            allowed = "" if facts.max_positions >= own else f" (its own: {own})"
            raise ContextOverflow(
                f"{asked} need {needed} positions, and {facts.model_id} has {facts.max_positions}{allowed}",
                hint="shorten the prompt or lower --max-tokens"
                if not allowed
                else "shorten the prompt, lower --max-tokens, or raise --context",
                param=param,
            )
        if facts.gate.variant == "none" and needed > facts.plan.run.kv_budget:
            raise ContextOverflow(
                f"{asked} do not fit the {facts.plan.run.kv_budget} slots of a cache that may evict nothing",
                hint=f"--kv-budget {needed}, or gates: --gates streaming",
                param=param,
            )

    def room(self, request: Request) -> int:
        """Return how many tokens may follow the request's prompt; below 1 when the prompt alone is too long."""
        facts = self.facts
        limit = min(self._positions, facts.plan.run.kv_budget) if facts.gate.variant == "none" else self._positions
        return limit - self._tokens_before(request) - len(request.prompt_token_ids) + 1

    @property
    def _positions(self) -> int:
        """How long a sequence may become: without an end where positions are given anew."""
        return self.facts.max_positions if self._runner.cache.rebase is None else sys.maxsize

    def _tokens_before(self, request: Request) -> int:
        parked = self._scheduler.parked.get(request.continues or "")
        return parked.seen + len(parked.unread) if parked is not None else 0

    def _move(self, source: int, target: int) -> list[TokenEvent]:
        # Once more where memory is short: the source stays whole until all is copied.
        _, failure = attempt(lambda: self._runner.move(source, target), tries=2)
        return [] if failure is None else [self._out_of_memory(self._scheduler.running[target], failure)]

    def _start(self, row: Row) -> list[TokenEvent]:
        state = self._states[row.request.id]
        state.started = time.perf_counter()
        if self.text is not None and self.text.think_tags is not None:
            params = row.request.params
            before = () if params.grammar is not None else (*row.history, *row.request.prompt_token_ids)
            budget = params.think_budget if params.may_think_too_long else None
            state.thought = self.text.think_tags.follow(before, budget)
        _, failure = attempt(lambda: self._runner.start(row), tries=2)
        return [] if failure is None else [self._out_of_memory(row, failure)]

    def _run(self, batch: Prefill | Decode) -> list[TokenEvent]:
        started = time.perf_counter()
        tokens, failure = attempt(lambda: self._runner.run(batch))
        if tokens is None:
            return [self._out_of_memory(row, failure or "") for row in self._recovery.undo(batch)]
        self._scheduler.passed(batch)
        self._seconds[type(batch)] += time.perf_counter() - started
        self._counts["steps"] += 1
        if isinstance(batch, Prefill):
            self._counts["prefill_tokens"] += sum(len(chunk.token_ids) for chunk in batch.chunks)
        else:
            self._counts["decode_tokens"] += len(tokens)
        return [self._accept(row, token) for row, token in tokens]

    def _accept(self, row: Row, token: int) -> TokenEvent:
        """Append a token to its sequence and say what came of it."""
        if token == NO_TOKEN:
            return self._no_token(row)
        request, state = row.request, self._states[row.request.id]
        row.output.append(token)
        row.failures, row.saved = 0, None
        if state.thought is not None:
            state.thought.push(token)
        logprobs = () if row.logprob is None else (row.logprob,)
        if state.first_token is None:
            state.first_token = time.perf_counter()
        ends = token in self.facts.eos_token_ids and not request.params.ignore_eos
        detokenizer = state.detokenizer
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

    def _out_of_memory(self, row: Row, reason: str) -> TokenEvent:
        return self._give_up(row, f"out of memory with everything else given up: {reason}", "out_of_memory")

    def _no_token(self, row: Row) -> TokenEvent:
        """End a request whose next token cannot be told, and forget what it has fed."""
        failure = self._runner.sampler.failure(row.index)
        if failure is None and row.request.params.grammar is not None:
            failure = "no token of the model's vocabulary follows the format"
        if not row.output:
            self._runner.restart(row)
        if failure is not None:
            return self._give_up(row, failure)
        return self._give_up(row, f"the model's logits are no numbers in {self.facts.plan.run.dtype}", "not_finite")

    def _give_up(self, row: Row, error: str, code: ErrorCode | None = None) -> TokenEvent:
        """End a request that fails; what it had before its first token is as it was."""
        detokenizer = self._states[row.request.id].detokenizer
        text = detokenizer.finish() if detokenizer is not None and row.output else ""
        return TokenEvent(
            request_id=row.request.id,
            text=text,
            finish_reason="error",
            stats=self._finish(row, begun=bool(row.output)),
            error=error,
            error_code=code,
        )

    def _finish(self, row: Row, *, begun: bool = True) -> RequestStats:
        self._runner.leave(row)
        if begun:
            self._scheduler.finish(row)
        else:
            self._scheduler.give_up(row)
            if row.before is not None:
                self._runner.protect(row.before)
        self._counts["shared_prefix_tokens"] += row.shared
        state, now, cache = self._states.pop(row.request.id), time.perf_counter(), self._runner.cache
        self._evicted += cache.evicted(row.index)
        return RequestStats(
            prompt_tokens=len(row.request.prompt_token_ids),
            completion_tokens=len(row.output),
            reasoning_tokens=None if state.thought is None else state.thought.tokens,
            shared_prefix_tokens=row.shared,
            queue_s=state.started - state.added,
            ttft_s=None if state.first_token is None else state.first_token - state.added,
            total_s=now - state.added,
            cache=CacheStats(
                seen_tokens=row.seen,
                kept_per_head=cache.kept_per_head(row.index),
                evicted=cache.evicted(row.index),
                pinned_per_head=self._runner.pinned(row),
            ),
            prefill_chunk=row.chunk,
            continued_tokens=row.base,
            no_graph=self._runner.no_graph,
        )

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
    def free_rows(self) -> int:
        """Count the rows that one more request could have now: neither running nor kept, nor waited for."""
        return self._scheduler.free_rows

    def running_s(self, request_id: str) -> float:
        """Return how long ago a request got its row, 0 when it waits for one."""
        started = self._states[request_id].started
        return time.perf_counter() - started if started else 0.0

    @property
    def first_token_s(self) -> float | None:
        """Return how long the oldest running request waited for its first token; None while it still does."""
        row = next(iter(self._scheduler.running.values()), None)
        state = None if row is None else self._states[row.request.id]
        if state is None or state.first_token is None:
            return None
        return state.first_token - state.added

    @property
    def reading(self) -> tuple[int, int]:
        """Count the prompt tokens that were read, and all there are, of the requests that still read theirs."""
        rows = [row for row in self._scheduler.running.values() if row.prefilling]
        waiting = sum(len(request.prompt_token_ids) for request in self._scheduler.waiting)
        whole = sum(len(row.request.prompt_token_ids) for row in rows)
        return sum(row.fed for row in rows), whole + waiting

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
    def kv_bytes(self) -> int:
        return self._runner.cache.nbytes

    @property
    def peak_bytes(self) -> int:
        return peak_bytes(self._runner.device)

    def measured_peaks(self) -> dict[str, int]:
        """Return the largest sizes so far by who counts them: the process, and on a GPU allocator and NVML."""
        return measured_peaks(self._runner.device)

    def snapshot(self) -> CacheSnapshot | None:
        """Look at what the oldest running request's row holds; cheap, and never waits for the device."""
        row = next(iter(self._scheduler.running.values()), None)
        return None if row is None else self._snapshots.take(row.index)

    def start_trace(self) -> None:
        """Remember log_beta of every token from now on; meant for one request at a time."""
        self._runner.trace = [[] for _ in self._runner.cache.layers]

    def traced_log_beta(self) -> list[list[list[float]]]:
        """Return what was remembered since `start_trace`: `[layer][head][token]`."""
        assert self._runner.trace is not None, "start_trace comes first"
        return [torch.cat(steps, dim=2)[0].tolist() for steps in self._runner.trace]

    def resize(self, kv_budget: int) -> Resized:
        """Change the slots per head while requests run or are kept; these go on with what the new size holds.

        Fewer slots evict by score, as it is now; more begin empty. From then on results are those of the new size.

        Raises:
            UsageError: no slot at all, none beside pinned tokens, or positions are given anew.
            DoesNotFit: more than the budget holds, old and new of what is moved at once counted.
            ContextOverflow: fewer than a full cache, which may evict nothing, holds already.
            OutOfDeviceMemory: there was not enough memory after all; the size stays as it was.
        """
        return self._resized(*self._resizing.to_slots(self.facts.plan, kv_budget))

    def set_budget(self, budget_bytes: int) -> Resized:
        """Give the process another budget: the slots shrink where they must, or grow, to what was trained at most.

        The larger of both budgets holds while slots move; peaks count from then on.

        Raises:
            DoesNotFit: no slot fits beside all the rest; nothing has changed.
            TrimkvError: as `resize`.
        """
        return self._resized(*self._resizing.to_budget(self.facts.plan, budget_bytes))

    def _resized(self, plan: Plan, done: Resized) -> Resized:
        self.facts = replace(self.facts, plan=plan)
        self.fingerprint = {**self.fingerprint, "kv_budget": str(plan.run.kv_budget)}
        return done
