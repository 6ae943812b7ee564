"""Conversations whose rows were kept: found again when a request comes with their whole history."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimkv_cli.chat.turns import split_thought

if TYPE_CHECKING:
    from trimkv_cli.engine.row_files import RowState


@dataclass(slots=True, eq=False, kw_only=True)
class History:
    """What one row holds: the tokens that it was `fed`, and the messages and the answer of which they come.

    `how` is what else decides how messages are rendered: tools, thinking. `state` is the row put aside, None while it
    is still in the cache, under the request's id.
    """

    id: str
    fed: tuple[int, ...]
    messages: tuple[Mapping[str, Any], ...] = ()  # none for a plain prompt
    how: object = None
    answer: Mapping[str, Any] | None = None  # as a message
    last_token: int | None = None  # of the answer, which has not been fed
    state: RowState | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes

    def is_begun_by(self, messages: Sequence[Mapping[str, Any]], how: object) -> bool:
        """Say whether a conversation begins with this one, and goes on after its answer."""
        count = len(self.messages)
        return (
            self.answer is not None
            and len(messages) > count + 1
            and how == self.how
            and all(map(_same, self.messages, messages))
            and _same(self.answer, messages[count])
        )


class Histories:
    """Hold the newest conversations: some in rows of the cache, and a bounded number put aside in memory.

    For the thread of the engine alone, but for `find`, which any thread may call.
    """

    def __init__(self, most_aside: int) -> None:
        self._most_aside = most_aside
        self._held: OrderedDict[str, History] = OrderedDict()  # the one used longest ago first

    def __len__(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Count the bytes of those put aside; the others lie in the cache's own."""
        return sum(history.nbytes for history in self._held.values())

    def find(self, messages: Sequence[Mapping[str, Any]], how: object) -> History | None:
        """Return the longest history with which a conversation begins."""
        found = (each for each in tuple(self._held.values()) if each.is_begun_by(messages, how))
        return max(found, key=lambda history: len(history.messages), default=None)

    def find_tokens(self, token_ids: Sequence[int]) -> History | None:
        """Return the longest history with whose tokens a prompt begins, and goes on."""
        found = (
            each
            for each in tuple(self._held.values())
            if len(each.fed) < len(token_ids) and tuple(token_ids[: len(each.fed)]) == each.fed
        )
        return max(found, key=lambda history: len(history.fed), default=None)

    def keep(self, history: History) -> None:
        """Add the newest."""
        self._held[history.id] = history

    def take(self, history: History) -> None:
        """Remove one, which goes on."""
        del self._held[history.id]

    def oldest_in_row(self) -> History | None:
        """Return the one in a row of the cache that was used longest ago."""
        return next((history for history in self._held.values() if history.state is None), None)

    def put_aside(self, history: History, save: Callable[[], RowState], *, but: History | None = None) -> None:
        """Let one give its row back, with what `save` copies; before that the one used longest ago is forgotten.

        That is where too many lie aside: `but` is never forgotten, and not counted as its copy goes soon.
        """
        aside = [each for each in self._held.values() if each.state is not None and each is not but]
        for old in aside[: max(0, len(aside) + 1 - self._most_aside)]:
            self.take(old)
        if self._most_aside:
            history.state = save()
        else:
            self.take(history)

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()


def _same(kept: Mapping[str, Any], sent: Mapping[str, Any]) -> bool:
    """Compare messages as they read: an answer may have lost its reasoning, or blanks at its ends."""
    if kept["role"] != sent["role"] or {**kept, "content": ""} != {**sent, "content": ""}:
        return False
    ours, theirs = kept.get("content") or "", sent.get("content") or ""
    if kept["role"] != "assistant":
        return bool(ours == theirs)
    texts = {ours.strip(), split_thought(ours)[1].strip(), split_thought(ours, inside=True)[1].strip()}
    return theirs.strip() in texts - ({""} if ours.strip() else set())
