"""Tells a log how a job is going: a line now and then, no cursor codes."""

from __future__ import annotations

import json
import time
from typing import TextIO

from trimkv_cli.jobs.summary import Summary


class PlainProgress:
    """Print one line every `every_s` seconds when called after each step."""

    def __init__(self, stream: TextIO, *, every_s: float = 10.0) -> None:
        self._stream = stream
        self._every_s = every_s
        self._due = time.monotonic() + every_s

    def __call__(self, summary: Summary) -> None:
        """Print when a line is due."""
        if (now := time.monotonic()) >= self._due:
            self._due = now + self._every_s
            print(self.line(summary), file=self._stream, flush=True)

    def line(self, summary: Summary) -> str:
        """Return what is printed."""
        return summary.progress()

    def end(self, summary: Summary) -> None:
        """Leave the last word to the report."""


class JsonProgress(PlainProgress):
    """Print one JSON object instead, for programs."""

    def line(self, summary: Summary) -> str:
        """Return all counts as JSON."""
        return json.dumps(summary.as_json())

    def end(self, summary: Summary) -> None:
        """Print the final counts."""
        print(self.line(summary), file=self._stream, flush=True)
