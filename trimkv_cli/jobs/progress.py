"""The tally of a job, and what ends it before its input does: limits, signals, time."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from trimkv_cli.errors import UsageError
from trimkv_cli.events import RequestStats
from trimkv_cli.jobs.lines import Item
from trimkv_cli.streams import Interrupts

_MOST_WARNINGS = 100  # kinds that are told apart; an input can hold any number of unknown keys


@dataclass(slots=True, kw_only=True)
class Summary:
    """Tally of one job, changed in place while it runs."""

    done: int = 0
    failed: int = 0  # our fault
    bad: int = 0  # the line's fault
    skipped: int = 0  # answered by an earlier run
    failed_before: int = 0  # failed in an earlier run, and not tried again
    running: int = 0
    stopped: str | None = None  # why the job ended before its input did
    prompt_tokens: int = 0
    completion_tokens: int = 0
    shared_tokens: int = 0  # prompt tokens that were copied instead of read
    budget_bytes: int | None = None
    peak_bytes: int | None = None  # of the process that used most, where there is a budget
    warnings: Counter[str] = field(default_factory=Counter)
    started_at: float = field(default_factory=time.perf_counter)

    @property
    def lines(self) -> int:
        return self.done + self.failed + self.bad

    @property
    def errors(self) -> int:
        return self.failed + self.bad

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started_at

    @property
    def decode_tps(self) -> float:
        return self.completion_tokens / max(self.elapsed_s, 1e-9)

    @property
    def over_budget(self) -> bool:
        return self.budget_bytes is not None and (self.peak_bytes or 0) > self.budget_bytes

    def note_memory(self, record: Mapping[str, Any]) -> None:
        """Take in what a record says of budget and memory."""
        budget = record.get("budget", {}).get("bytes")
        if budget is not None:
            self.budget_bytes = budget
            self.peak_bytes = max(self.peak_bytes or 0, record["memory"]["peak_bytes"])

    def count_tokens(self, choices: Sequence[RequestStats]) -> None:
        """Add the tokens of one item's choices, which share their prompt."""
        self.prompt_tokens += choices[0].prompt_tokens
        self.completion_tokens += sum(stats.completion_tokens for stats in choices)
        self.shared_tokens += sum(stats.shared_prefix_tokens for stats in choices)

    def count_record(self, record: dict[str, Any]) -> None:
        """Add what an answered or refused item's record says."""
        response = record["response"]
        if response is None:
            self.failed += 1
        elif response["status_code"] != 200:
            self.bad += 1
        else:
            self.done += 1
            usage = response["body"]["usage"]
            self.prompt_tokens += usage["prompt_tokens"]
            self.completion_tokens += usage["completion_tokens"]
            self.shared_tokens += usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
            self.note_memory(response["body"].get("trimkv", {}))

    def count_warnings(self, item: Item) -> None:
        for warning in item.warnings:
            known = warning.message in self.warnings or len(self.warnings) < _MOST_WARNINGS
            self.warnings[warning.message if known else "other keys or models passed over"] += 1

    def progress(self) -> str:
        """Return one line about a job that runs."""
        parts = [f"{self.done:,} done", f"{self.bad + self.failed:,} failed", f"{self.running:,} in flight"]
        return ", ".join([*parts, f"{self.decode_tps:.1f} tokens/s", f"{self.elapsed_s:.0f} s"])

    def report(self, *, blank_lines: int = 0) -> str:
        """Return the block that ends a job."""
        told = _counts(
            answered=self.done,
            bad=self.bad,
            failed=self.failed,
            blank=blank_lines,
            **{"answered before": self.skipped, "failed before": self.failed_before},
        )
        shared = f" ({self.shared_tokens:,} shared)" if self.shared_tokens else ""
        tokens = f"{self.prompt_tokens:,} prompt{shared} + {self.completion_tokens:,} completion"
        took = f"{self.elapsed_s:.1f} s, {self.decode_tps:.1f} tokens/s"
        return "\n".join([f"lines    {told}", f"tokens   {tokens}", f"time     {took}", *self._warnings()])

    def as_json(self, *, blank_lines: int = 0) -> dict[str, Any]:
        """Return all counts, under the names of `--summary-json`."""
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "started_at"}
        return {
            **counts,
            "warnings": dict(self.warnings),
            "blank": blank_lines,
            "elapsed_s": self.elapsed_s,
            "tokens_per_s": self.decode_tps,
        }

    def verdict(self, *, blank_lines: int = 0) -> str:
        """Return the block that ends a check of the input; `done` counts the good lines."""
        return "\n".join([f"lines    {_counts(good=self.done, bad=self.bad, blank=blank_lines)}", *self._warnings()])

    def _warnings(self) -> list[str]:
        return [f"warning  {text} ({_times(count)})" for text, count in self.warnings.items()]


def _counts(**counts: int) -> str:
    first = next(iter(counts))
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count or name == first)


def _times(count: int) -> str:
    return "1 line" if count == 1 else f"{count:,} lines"


Reason = Literal["signal", "time", "errors"]

_FEWEST_LINES = 100  # a share of errors means little before


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorLimit:
    """How many lines may fail: a count, or a share of those that have ended."""

    count: int | None = None
    percent: float | None = None

    def exceeded(self, summary: Summary, *, at_end: bool = False) -> bool:
        """Tell whether too many lines have failed; a share is judged from 100 lines on."""
        if self.count is not None:
            return summary.errors > self.count
        enough = summary.lines >= _FEWEST_LINES or at_end
        return self.percent is not None and enough and summary.errors * 100 > self.percent * summary.lines


def parse_error_limit(text: str) -> ErrorLimit:
    """Read `--max-errors`: a count, or a share as `5%`.

    Raises:
        UsageError: neither.
    """
    number = text.strip().removesuffix("%").strip()
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    is_share = text.strip().endswith("%")
    if not 0 <= value < float("inf") or (is_share and value > 100) or not (is_share or number.isdigit()):
        raise UsageError(f"--max-errors {text} is no count and no share", hint="write it like 10 or 5%")
    return ErrorLimit(percent=value) if is_share else ErrorLimit(count=int(number))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What may end an item, or the job, early."""

    timeout_s: float | None = None  # of one item, from when it gets its row
    max_time_s: float | None = None  # of the job; then as after a signal
    grace_s: float = 10.0  # for rows in flight when the job is stopped
    errors: ErrorLimit = field(default_factory=ErrorLimit)
    fail_fast: bool = False

    def grace_for(self, reason: Reason) -> float:
        """Return how long rows in flight may still take: the first error of `fail_fast` ends the job at once."""
        return 0.0 if self.fail_fast and reason == "errors" else self.grace_s

    def too_many_errors(self, summary: Summary) -> bool:
        """Tell whether a job has to end for the lines that failed."""
        return self.errors.exceeded(summary) or (self.fail_fast and summary.errors > 0)


@dataclass(slots=True, kw_only=True)
class Stop:
    """Carry the wish to end a job from whoever has it to the loop; the first one counts."""

    reason: Reason | None = None
    asked_at: float = 0.0

    def ask(self, reason: Reason) -> None:
        if self.reason is None:
            self.reason, self.asked_at = reason, time.monotonic()

    def over(self, grace_s: float) -> bool:
        """Tell whether rows in flight have had their time."""
        return self.reason is not None and time.monotonic() - self.asked_at >= grace_s


def stopped_by_signals(stop: Stop) -> Interrupts:
    """Let the first SIGINT or SIGTERM ask for the end and the second end the process; ignored signals stay ignored."""
    heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    return Interrupts(*heeded, on_first=lambda: stop.ask("signal"))
