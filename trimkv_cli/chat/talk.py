"""A conversation as those see it who show and store it, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from trimkv_cli.chat.snapshots import Snapshots
from trimkv_cli.chat.turns import Turn
from trimkv_cli.events import RequestStats, TokenEvent
from trimkv_cli.request import SamplingParams

Steps = Iterator[Sequence[TokenEvent]]
Asked = Callable[[], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the cache holds of a conversation, and what memory its process takes; horizon None = not known."""

    kept: int  # per head
    seen: int
    slots: int  # per head
    horizon: int | None
    budget_bytes: int | None
    peak_bytes: int


class Talk(Protocol):
    """The turns of a conversation, and what makes the next one."""

    system: str | None
    think: bool | None
    params: SamplingParams
    fits_rest: bool
    turns: list[Turn]
    snapshots: Snapshots

    @property
    def model_id(self) -> str: ...
    @property
    def fingerprint(self) -> Mapping[str, str]: ...
    @property
    def facts(self) -> Mapping[str, str]:
        """Say in words what answers."""
        ...

    @property
    def held(self) -> Held: ...
    @property
    def slow(self) -> bool:
        """Say whether it answers so slowly that a line about its progress need not change often."""
        ...

    @property
    def progress(self) -> tuple[int, int] | None:
        """Count the tokens that the running turn has read, and those it has to read; None = not known."""
        ...

    @property
    def last_stats(self) -> RequestStats | None: ...
    @property
    def must_reread(self) -> bool: ...
    @property
    def why_lost(self) -> str | None: ...
    @property
    def starts_in_thought(self) -> bool: ...
    def say(self, user: str, stopped: Asked, *, attempt: int = 0) -> Steps: ...
    def go_on(self, stopped: Asked) -> Steps: ...
    def undo(self, count: int = 1) -> list[Turn]: ...
    def redo(self, turns: Sequence[Turn]) -> None: ...
    def clear(self) -> None: ...
    def load(self, turns: Sequence[Turn]) -> None: ...
    def read_again(self) -> None: ...
    def save_state(self) -> None: ...
