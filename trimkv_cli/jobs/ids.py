"""A set of custom ids that lies on disk, so that memory does not grow with the lines of an input."""

from __future__ import annotations

import hashlib
import sqlite3

from trimkv_cli.errors import TrimkvError

_SETTINGS = ("journal_mode = OFF", "synchronous = OFF", "locking_mode = EXCLUSIVE", "cache_size = -4096")
_ID_BYTES = 16
_NOTED = 1 << 15


class IdIndex:
    """Hold hashes of ids in a nameless temporary database; an id counts as seen when its 128-bit hash was."""

    def __init__(self) -> None:
        # SQLite removes its own temporary databases (name ""), spills them to disk, and needs no clean-up after a kill.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for setting in _SETTINGS:
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("CREATE TABLE ids (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")
        self._cursor = self._database.cursor()
        self._noted: list[bytes] = []

    def add(self, custom_id: str) -> bool:
        """Put an id in; say whether it is new.

        Raises:
            TrimkvError: the disk for temporary files is full.
        """
        self._write_noted()
        return self._execute(_hash(custom_id))

    def note(self, custom_id: str) -> None:
        """Put an id in when it does not matter whether it is new: many at once, which is faster.

        Raises:
            TrimkvError: as `add`.
        """
        self._noted.append(_hash(custom_id))
        if len(self._noted) >= _NOTED:
            self._write_noted()

    def __contains__(self, custom_id: str) -> bool:
        self._write_noted()
        found = self._cursor.execute("SELECT 1 FROM ids WHERE hash = ?", (_hash(custom_id),)).fetchone()
        return found is not None

    def _execute(self, *hashes: bytes) -> bool:
        try:
            self._cursor.executemany("INSERT OR IGNORE INTO ids VALUES (?)", ((value,) for value in hashes))
        except sqlite3.Error as error:
            raise TrimkvError(f"cannot keep the ids of the lines: {error}", hint="TMPDIR names another disk") from error
        return self._cursor.rowcount == 1

    def _write_noted(self) -> None:
        if self._noted:
            noted, self._noted = sorted(self._noted), []  # in order: each page of the tree is touched once
            self._execute(*noted)


def _hash(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=_ID_BYTES).digest()
