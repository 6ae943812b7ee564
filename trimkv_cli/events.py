"""Small frozen records of what leaves the engine, the only thing that user interfaces and jobs see of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from trimkv_cli.errors import OutOfDeviceMemory, TrimkvError
from trimkv_cli.request import Request

FinishReason = Literal["stop", "length", "abort", "error"]
ErrorCode = Literal["out_of_memory", "not_finite"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """What a user should know although the work goes on."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """What one sequence's cache holds when its request ends."""

    seen_tokens: int
    kept_per_head: int  # slots in use per KV head of a full-attention layer
    evicted: int  # (layer, head) slots lost so far: sum over layers and heads of seen − kept
    pinned_per_head: int = 0  # of those kept, by --pin


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStats:
    """Count and time one request; all times in seconds since it was added."""

    prompt_tokens: int
    completion_tokens: int
    shared_prefix_tokens: int  # prompt tokens copied from another row's prefill
    queue_s: float
    ttft_s: float | None  # None when no token was made
    total_s: float
    cache: CacheStats
    reasoning_tokens: int | None = None  # of the completion's; None where the model knows no reasoning
    prefill_chunk: int | None = None  # where memory forced smaller chunks than planned
    continued_tokens: int = 0  # those that its row held already, of the request that it continues
    no_graph: str | None = None  # why a GPU decoded without a graph, which is slow

    def details(self, *others: RequestStats) -> dict[str, dict[str, int]]:
        """Return what OpenAI's `usage` says of the tokens of this answer and `others`; nothing without reasoning."""
        if self.reasoning_tokens is None:
            return {}
        tokens = sum(each.reasoning_tokens or 0 for each in (self, *others))
        return {"completion_tokens_details": {"reasoning_tokens": tokens}}

    @property
    def warnings(self) -> tuple[Notice, ...]:
        """What the reader of an answer should know."""
        said = []
        if self.prefill_chunk is not None:
            message = f"memory ran out: the prompt was read in chunks of {self.prefill_chunk}, which changes results"
            said.append(Notice(code="prefill_chunk_reduced", message=message))
        if self.no_graph is not None:
            message = f"no graph of a decode could be captured, and without one it is slower: {self.no_graph}"
            said.append(Notice(code="no_graph", message=message))
        return tuple(said)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """The log probability of a token, and the likeliest tokens of its step: (token id, log probability)."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """New output of one request; the last event of a request has a `finish_reason` and `stats`."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    stats: RequestStats | None = None
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token id, when the request asks for them
    error: str | None = None  # what went wrong when finish_reason is "error"
    error_code: ErrorCode | None = None

    @property
    def fault(self) -> TrimkvError | None:
        """Return what went wrong as an error with its hint and exit code; None when nothing did."""
        if self.finish_reason != "error":
            return None
        message = self.error or "the engine gave this request up"
        if self.error_code == "out_of_memory":
            hint = "a smaller --budget, --kv-budget or --prefill-chunk; trimkv plan shows the parts"
            return OutOfDeviceMemory(message, hint=hint)
        if self.error_code == "not_finite":
            return TrimkvError(message, hint="--dtype bf16 or fp32 reach further; or get the model again")
        return TrimkvError(message, hint="another prompt, seed or format may go on")


@dataclass(slots=True)
class Answer:
    """What has come of a request so far, gathered from its events."""

    request: Request
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: TokenEvent | None = None  # the event with which it ended

    def take(self, event: TokenEvent) -> None:
        """Add what an event brings."""
        self.pieces.append(event.text)
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        if event.finish_reason is not None:
            self.last = event

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def finish_reason(self) -> FinishReason | None:
        return None if self.last is None else self.last.finish_reason

    @property
    def stats(self) -> RequestStats:
        """Return what an answer that has ended cost."""
        assert self.last is not None, "the answer is under way"
        assert self.last.stats is not None, "the last event carries stats"
        return self.last.stats


@dataclass(frozen=True, slots=True, kw_only=True)
class Resized:
    """What a change of the slots per head did."""

    kv_budget_before: int
    kv_budget: int
    evicted: int  # (layer, head) slots lost, over all sequences
    kv_bytes_before: int
    kv_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStats:
    """Sum up an engine since it was loaded."""

    prefill_tokens: int
    decode_tokens: int
    shared_prefix_tokens: int
    steps: int
    prefill_s: float
    decode_s: float
    undone_steps: int = 0  # steps that ran out of memory and were tried again


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """What an engine's parts take, in bytes, and what one sequence would take in a cache that forgets nothing."""

    weights_bytes: int
    gate_bytes: int
    kv_bytes: int
    workspace_bytes: int  # as planned
    peak_bytes: int
    budget_bytes: int | None
    seen_tokens: int
    full_cache_bytes: int  # for the tokens seen


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSnapshot:
    """What one sequence's cache holds while it grows; of large caches an estimate from some slots of each head."""

    seen_tokens: int
    kept_per_head: int  # slots in use per KV head
    slots: int  # per KV head
    shares: tuple[float, ...]  # of heads that hold each of up to 64 equal parts of the sequence
    horizons: tuple[tuple[int, ...], ...]  # [layer][head], median age of what is held, in tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMemory:
    """What one KV head holds, in the order of positions; `threshold` is its lowest score, None while slots are free."""

    positions: tuple[int, ...]
    log_beta: tuple[float, ...]
    threshold: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMemory:
    """The heads of one layer, each with `slots` slots; in a layer with a window nothing older is held.

    `static` scores do not fade: each is the `log_beta` of its token. What lies in a half-open interval of `protected`
    positions stays for now.
    """

    slots: int
    window: int | None
    heads: tuple[HeadMemory, ...]
    recent: int = 0  # the newest tokens, which are pinned
    static: bool = False
    protected: tuple[tuple[int, int], ...] = ()

    def protects(self, position: int) -> bool:
        """Say whether a position lies in a protected interval."""
        return any(first <= position < end for first, end in self.protected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """What all layers hold of the `seen` tokens of a sequence."""

    seen: int
    layers: tuple[LayerMemory, ...]

    @property
    def heads(self) -> Iterator[tuple[LayerMemory, HeadMemory]]:
        """Yield every (layer, head) pair."""
        return ((layer, head) for layer in self.layers for head in layer.heads)

    @property
    def num_heads(self) -> int:
        """Count the KV heads of all layers."""
        return sum(len(layer.heads) for layer in self.layers)

    def stays_for_prompt(self, position: int) -> bool:
        """Say whether a position lies at an end of the newest prompt, which is pinned until the next one begins."""
        return self.layers[0].protects(position)

    def pinned(self) -> dict[int, bool]:
        """Return the positions that some head holds and that no score can evict, and whether each stays for good."""
        found: dict[int, bool] = {}
        for layer, head in self.heads:
            for position, log_beta in zip(head.positions, head.log_beta, strict=True):
                if log_beta == math.inf or layer.protects(position) or position >= self.seen - layer.recent:
                    found[position] = found.get(position, False) or log_beta == math.inf
        return dict(sorted(found.items()))

    @property
    def static(self) -> bool:
        """Say whether scores do not fade."""
        return any(layer.static for layer in self.layers)

    @property
    def full(self) -> bool:
        """Say whether some head has no free slot, so that tokens compete."""
        return any(head.threshold is not None for _, head in self.heads)

    def shares(self) -> list[float]:
        """Return for each position the share of (layer, head) pairs that still hold it: `[seen]`, 0 to 1."""
        counts = [0] * self.seen
        for _, head in self.heads:
            for position in head.positions:
                counts[position] += 1
        return [count / self.num_heads for count in counts]

    def survivals(self) -> list[float]:
        """Return for how many more tokens the last head is expected to hold each position: 0 = gone, inf = no end.

        A static score says nothing of that: NaN, unless a token is gone, pinned or protected.
        """
        longest = [0.0] * self.seen
        for layer, head in self.heads:
            for position, log_beta in zip(head.positions, head.log_beta, strict=True):
                worth = math.inf if layer.protects(position) else log_beta
                expected = survival(self.seen, position, worth, head.threshold, layer.window, static=layer.static)
                if math.isnan(expected):
                    longest[position] = longest[position] if math.isinf(longest[position]) else math.nan
                    continue
                expected = max(expected, float(position + layer.recent - self.seen))
                longest[position] = max(expected, longest[position])
        return longest

    def next_out(self) -> list[tuple[int, int]]:
        """List (position, heads) of what the heads without a free slot would give up first, most heads first."""
        counts: Counter[int] = Counter()
        for layer, head in self.heads:
            if head.threshold is not None:
                counts[_lowest(self.seen, head, layer)] += 1
        return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def survival(
    seen: int, position: int, log_beta: float, threshold: float | None, window: int | None, *, static: bool = False
) -> float:
    """Estimate for how many more tokens a head holds one; the threshold moves, so this is no promise.

    NaN where scores are `static`, which is no estimate.
    """
    in_window = math.inf if window is None else position + window - seen
    if threshold is None or log_beta == math.inf or (log_beta >= 0.0 and not static):
        return max(0.0, in_window)
    if static:
        return math.nan
    return max(0.0, min(in_window, position + threshold / log_beta - seen - 1))


def median_age(seen: int, head: HeadMemory) -> int:
    """Return the median age in tokens of what a head holds: its horizon; 0 when it holds nothing."""
    return seen - head.positions[len(head.positions) // 2] if head.positions else 0


def _lowest(seen: int, head: HeadMemory, layer: LayerMemory) -> int:
    """Return the position with the lowest score, the pinned newest and protected ones aside; of equal ones the newest.

    Where nothing else is left it is one of those.
    """
    held = list(zip(head.positions, head.log_beta, strict=True))
    free = [(p, log_beta) for p, log_beta in held if p < seen - layer.recent and not layer.protects(p)]
    scores = ((log_beta if layer.static else log_beta * (seen + 1 - p), -p) for p, log_beta in free or held)
    return -min(scores)[1]
