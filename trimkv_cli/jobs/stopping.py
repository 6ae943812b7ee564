"""The limits of a job, and the wish to end it before its input does: signals, time, errors."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, field
from typing import Literal

from trimkv_cli.errors import UsageError
from trimkv_cli.jobs.summary import Summary
from trimkv_cli.streams import Interrupts

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
