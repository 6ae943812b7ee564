"""The loop: requests in, token events out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

import torch

from trimkv_cli.engine.facts import EngineFacts
from trimkv_cli.engine.gauges import Progress
from trimkv_cli.engine.recovery import attempt
from trimkv_cli.engine.resizing import Resizing
from trimkv_cli.engine.sampler import NO_TOKEN
from trimkv_cli.engine.scheduler import Decode, Prefill, Row
from trimkv_cli.errors import ContextOverflow, UsageError
from trimkv_cli.events import CacheStats, ErrorCode, FinishReason, RequestStats, TokenEvent
from trimkv_cli.request import Request, check_token_ids

__all__ = ["Engine", "EngineFacts"]


class Engine(Resizing):
    """Run many requests over the rows of one bounded cache, each at its own pace."""

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
        slots = (facts.spec.slots(layer, facts.plan.run.kv_budget) for layer in range(facts.spec.num_layers))
        facts.pins.check(request.prefix_len, min(slots), sinks=facts.gate.kept)
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

    def add(self, request: Request) -> None:
        """Queue a request; its id must not be in use."""
        self.check(request)
        assert request.id not in self._progress, f"request id {request.id!r} is in use"
        detokenizer = self.text.detokenizer(request.params.stop) if self.text is not None else None
        self._progress[request.id] = Progress(detokenizer=detokenizer)
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

    def stop(self, request_id: str) -> TokenEvent | None:
        """End a running request now, as if it had reached its length; None when it is not running."""
        row = self._scheduler.find(request_id)
        if row is None:
            return None
        detokenizer = self._progress[request_id].detokenizer
        text = detokenizer.finish() if detokenizer is not None else ""
        return TokenEvent(request_id=request_id, text=text, finish_reason="abort", stats=self._finish(row))

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
        return [self._out_of_memory(self._scheduler.running[target], failure or "")]

    def _start(self, row: Row) -> list[TokenEvent]:
        self._progress[row.request.id].started = time.perf_counter()
        for _ in range(2):
            _, failure = attempt(lambda: self._runner.start(row))
            if failure is None:
                return []
        return [self._out_of_memory(row, failure or "")]

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
        detokenizer = self._progress[row.request.id].detokenizer
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
