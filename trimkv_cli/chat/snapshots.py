"""The states of the cache between turns: the last few, in a session's folder or in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trimkv_cli.errors import InputError, ModelError

if TYPE_CHECKING:
    from trimkv_cli.engine.row_files import RowState


class Snapshots:
    """Keep the newest state and `depth` before it, each under the number of turns that were behind it.

    With a folder they lie there as files (`write_row`), whose names change with their tokens, so that a transcript
    never names a state of another conversation; without one, in memory.
    """

    def __init__(self, depth: int, *, model_id: str, fingerprint: Mapping[str, str]) -> None:
        self.depth = depth
        self.files: dict[int, str] = {}
        self._model_id = model_id
        self._fingerprint = fingerprint
        self._folder: Path | None = None
        self._held: dict[int, RowState] = {}

    @property
    def counts(self) -> list[int]:
        """List the numbers of turns after which a state is there."""
        return sorted({*self._held, *self.files})

    def put(self, turns: int, state: RowState) -> None:
        """Add the state after `turns` turns; what was there for it and for more turns goes, and the oldest goes."""
        self.drop_from(turns)
        if self._folder is None:
            self._held[turns] = state
        else:
            self.files[turns] = self._write(turns, state)
        for old in self.counts[: -self.depth - 1]:
            self.drop(old)

    def get(self, turns: int) -> RowState | None:
        """Return the state after `turns` turns, None when there is none.

        Raises:
            CacheMismatch, InputError: there is a file, but it is another engine's, or damaged.
        """
        name = self.files.get(turns)
        if name is None or self._folder is None:
            return self._held.get(turns)
        from trimkv_cli.engine.row_files import read_row

        state = read_row(self._folder / name, model_id=self._model_id, fingerprint=self._fingerprint)
        if _file_name(turns, state) != name:
            raise InputError(f"{name} holds other tokens than its session")
        return state

    def drop_from(self, turns: int) -> None:
        """Forget the states after `turns` turns and more; files stay until the store drops them."""
        for count in [count for count in self.counts if count >= turns]:
            self.drop(count)

    def clear(self) -> None:
        self.drop_from(0)

    def move_to(self, folder: Path | None) -> None:
        """Put all states into a folder, or with None into memory, from now on; unreadable ones are left out."""
        states = {turns: self._get_or_none(turns) for turns in self.counts}
        self.clear()
        self._folder = folder
        for turns, state in sorted(states.items()):
            if state is not None:
                self.put(turns, state)

    def use(self, fingerprint: Mapping[str, str], fit: Callable[[RowState], RowState]) -> None:
        """Go on with an engine whose sizes have changed: `fit` makes each state one of its, one after the other."""
        before = self._fingerprint
        for turns in self.counts:
            self._fingerprint = before
            state = self._get_or_none(turns)
            self._fingerprint = fingerprint
            if state is None:
                self.drop(turns)
            elif self._folder is None:
                self._held[turns] = fit(state)
            else:
                self.files[turns] = self._write(turns, fit(state))
        self._fingerprint = fingerprint

    def open(self, folder: Path, files: Mapping[int, str]) -> None:
        """Take over the states that a stored session has."""
        files = dict(files)  # it may be our own
        self.clear()
        self._folder, self.files = folder, files

    def _get_or_none(self, turns: int) -> RowState | None:
        try:
            return self.get(turns)
        except (ModelError, InputError):
            return None

    def _write(self, turns: int, state: RowState) -> str:
        from trimkv_cli.engine.row_files import write_row

        assert self._folder is not None
        name = _file_name(turns, state)
        write_row(self._folder / name, state, model_id=self._model_id, fingerprint=self._fingerprint)
        return name

    def drop(self, turns: int) -> None:
        self._held.pop(turns, None)
        self.files.pop(turns, None)


def _file_name(turns: int, state: RowState) -> str:
    ids = ",".join(map(str, (*state.token_ids, "/", *state.unread, "/", state.last_token)))
    return f"{turns:04}-{hashlib.sha256(ids.encode()).hexdigest()[:16]}.kv"
