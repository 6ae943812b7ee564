"""The passing line of a turn that is running: what was read of the prompt, then how fast the answer is written."""

from __future__ import annotations

import time

from trimkv_cli.ui.chat.answer import AnswerView
from trimkv_cli.ui.chat.screen import Screen

_FIRST_S = 0.2  # a quick answer needs no line


class Meter:
    """Draw the line at most every `interval_s` seconds, from counts that the host has anyway."""

    def __init__(self, screen: Screen, view: AnswerView, *, seen: int, slots: int, interval_s: float) -> None:
        self.generated = 0
        self._screen = screen
        self._view = view
        self._seen = seen
        self._slots = slots
        self._interval_s = interval_s
        self._next = time.monotonic() + _FIRST_S
        self._first_token = 0.0

    @property
    def due(self) -> bool:
        """Say whether it is time to draw; asked after every step."""
        now = time.monotonic()
        if self.generated and not self._first_token:
            self._first_token = now
        return now >= self._next and self._screen.moves and not self._view.mid_line

    def draw(self, *, read: int, to_read: int) -> None:
        """Draw the line for so many tokens of the prompt that have been read."""
        now = time.monotonic()
        self._next = now + self._interval_s
        if not self.generated:
            self._screen.passing(f"reading {read:,} of {to_read:,} tokens")
            return
        look, seen = self._screen.look, self._seen + read + self.generated
        facts = [f"kept {min(seen, self._slots):,}/{seen:,}"]
        if self.generated > 1 and now > self._first_token:
            facts.append(f"{(self.generated - 1) / (now - self._first_token):.1f} tok/s")
        counts = look.dot.join(facts)
        room = look.width - len(counts) - 6
        preview = self._view.preview[-room:] if room > 0 else ""
        self._screen.passing(f"{preview}{look.dot if preview else ''}{counts}")
