"""Scores of answers, and the confidence in a share of right ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from trimkv_cli.eval.samples import Match, Sample

_Z95 = 1.959963984540054
_RESAMPLES = 2000


def normalise(text: str) -> str:
    """Fold what does not count: case, runs of white space, one final dot."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def is_right(output: str, answer: str, match: Match = "exact") -> bool:
    """Compare an output with the expected answer; `contains` looks for it as whole words within the output."""
    said, expected = normalise(output), normalise(answer)
    if match == "exact":
        return said == expected
    return f" {_words(expected)} " in f" {_words(said)} "


def judge(output: str, sample: Sample, match: Match) -> float:
    """Return the share of rules kept or points said, else 1 for an answer in one of the right wordings and 0."""
    if sample.rules:
        return sum(rule.kept(output) for rule in sample.rules) / len(sample.rules)
    if sample.points:
        return sum(is_right(output, point, "contains") for point in sample.points) / len(sample.points)
    answer = sample.value if match == "contains" and sample.value else sample.answer
    return float(any(is_right(output, wording, match) for wording in (answer, *sample.also)))


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


def bootstrap(scores: Sequence[float], documents: Sequence[str], *, seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean score when whole documents are drawn again, with what was asked of each.

    A single document, drawn again, is itself: it has none.
    """
    groups: dict[str, list[float]] = {}
    for score, document in zip(scores, documents, strict=True):
        groups.setdefault(document, []).append(score)
    if len(groups) < 2:
        return None
    sums = [(sum(group), len(group)) for group in groups.values()]
    rng = Random(f"bootstrap {seed}")  # noqa: S311
    means = []
    for _ in range(_RESAMPLES):
        drawn = rng.choices(sums, k=len(sums))
        means.append(sum(total for total, _ in drawn) / sum(count for _, count in drawn))
    means.sort()
    return means[round(0.025 * (_RESAMPLES - 1))], means[round(0.975 * (_RESAMPLES - 1))]


def interval(scores: Sequence[float], documents: Sequence[str]) -> tuple[float, float] | None:
    """Return Wilson's interval of right and wrong answers about a document each, else one by bootstrap."""
    if len(set(documents)) == len(documents) and set(scores) <= {0.0, 1.0}:
        return wilson(round(sum(scores)), len(scores))
    return bootstrap(scores, documents)


# static: gates of others; map-reduce: parts of a text, each in a full cache
Policy = Literal["full", "gates", "static", "keydiff", "streaming", "protected", "random", "map-reduce"]
EVERY_POLICY: tuple[Policy, ...] = get_args(Policy)
POLICIES: tuple[Policy, ...] = ("full", "gates", "keydiff", "streaming", "protected", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """The accuracy of one policy at one budget, and what it took; `kv_budget` is None for the full cache.

    Of `ppl` there are `nats` a token instead, with their interval, and the `ratio` of perplexities to the full cache's.

    On a CPU `peak_bytes` is the process's peak so far; small caches run first, so it does not hide their size.
    """

    task: str
    policy: str
    kv_budget: int | None
    accuracy: float | None
    n: int
    ci95: tuple[float, float] | None  # None where a single document was asked about: nothing says how others differ
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
    documents: int | None = None  # that the questions are about
    answer_tokens: float | None = None  # mean of what was said
    match: Match | None = None
    pins: str | None = None  # what is never evicted, as `--pin`; "" = nothing
    text: str | None = None  # a hash of the real text
    nats: float | None = None
    ratio: float | None = None
