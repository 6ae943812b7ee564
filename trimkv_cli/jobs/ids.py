"""A set of custom ids that lies on disk, so that memory does not grow with the lines of an input."""

from __future__ import annotations

import hashlib
import sqlite3

from trimkv_cli.errors import TrimkvError

_SETTINGS = ("journal_mode = OFF", "synchronous = OFF", "locking_mode = EXCLUSIVE", "cache_size = -4096")
_ID_BYTES = 16


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

    def add(self, custom_id: str) -> bool:
        """Put an id in; say whether it is new.

        Raises:
            TrimkvError: the disk for temporary files is full.
        """
        try:
            self._cursor.execute("INSERT OR IGNORE INTO ids VALUES (?)", (_hash(custom_id),))
        except sqlite3.Error as error:
            raise TrimkvError(f"cannot keep the ids of the lines: {error}", hint="TMPDIR names another disk") from error
        return self._cursor.rowcount == 1

    def __contains__(self, custom_id: str) -> bool:
        found = self._cursor.execute("SELECT 1 FROM ids WHERE hash = ?", (_hash(custom_id),)).fetchone()
        return found is not None


def _hash(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=_ID_BYTES).digest()
