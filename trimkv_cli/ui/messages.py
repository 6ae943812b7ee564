"""What trimkv says beside the answer: errors, warnings and notes, one plain line each on stderr."""

from __future__ import annotations

import sys

from trimkv_cli.ui.plain import neutralise


def print_error(message: str, hint: str | None) -> None:
    """Say what happened and, on a line of its own, what to try."""
    _say(f"error: {message}")
    if hint:
        _say(f"hint: {hint}")


def print_warning(message: str) -> None:
    """Say what the user should know although the work goes on."""
    _say(f"warning: {message}")


def print_note(message: str) -> None:
    """Say something that helps to understand what happens."""
    _say(message)


def _say(line: str) -> None:
    print(neutralise(line), file=sys.stderr, flush=True)
