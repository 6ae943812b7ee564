"""What an evaluation gives: one row per task, policy and budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Policy = Literal["full", "gates", "streaming", "random"]
POLICIES: tuple[Policy, ...] = ("full", "gates", "streaming", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The accuracy of one policy at one budget, and what it took; `kv_budget` is None for the full cache.

    On a CPU `peak_bytes` is the process's peak so far; small caches run first, so it does not hide their size.
    """

    task: str
    policy: Policy
    kv_budget: int | None
    accuracy: float
    n: int
    ci95: tuple[float, float]
    answer_logprob: float | None  # mean per token of the expected answers, in nats; None where none can be forced
    decode_tps: float
    peak_bytes: int
    kv_bytes: int  # of one sequence's cache, as planned
    prefill_chunk: int
    context: int  # tokens asked for; of a user's own data the longest prompt
    prompt_tokens: float  # mean
    seed: int
