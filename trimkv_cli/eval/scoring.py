"""Scores of answers, and the confidence in a share of right ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Match = Literal["exact", "contains"]

_Z95 = 1.959963984540054


def normalise(text: str) -> str:
    """Fold what does not count: case, runs of white space, one final dot."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def is_right(output: str, answer: str, match: Match = "exact") -> bool:
    """Compare an output with the expected answer; `contains` looks for it as whole words within the output."""
    said, expected = normalise(output), normalise(answer)
    if match == "exact":
        return said == expected
    return f" {_words(expected)} " in f" {_words(said)} "


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of right answers (Wilson 1927); of no answers it is (0, 1)."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = right / count, _Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def _words(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())


Policy = Literal["full", "gates", "streaming", "random"]
POLICIES: tuple[Policy, ...] = ("full", "gates", "streaming", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
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
    weights: str | None = None  # what they are in; older results do not say
    bits_per_weight: float | None = None
