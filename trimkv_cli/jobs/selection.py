"""The lines of an input that are left to run: not those of other shards, past the limit, or answered before."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import orjson

from trimkv_cli.errors import InputError, TrimkvError, UsageError
from trimkv_cli.jobs.lines import BadLine, Item, Rules, duplicate, id_of, parse_line
from trimkv_cli.jobs.progress import Summary
from trimkv_cli.jobs.reading import Line

_MOST_LINES = 1 << 36  # 8 GiB of bits: no input has so many lines


class Bitmap:
    """Hold non-negative integers; grows as far as the largest."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self.count = 0

    def add(self, number: int) -> None:
        """Put `number` in.

        Raises:
            InputError: it is no line number.
        """
        if not 0 <= number < _MOST_LINES:
            raise InputError(f"{number} is no line number")
        place, bit = number >> 3, 1 << (number & 7)
        if place >= len(self._bits):
            self._bits.extend(bytes(max(1024, place + 1 - len(self._bits), len(self._bits) // 2)))
        if not self._bits[place] & bit:
            self._bits[place] |= bit
            self.count += 1

    def __contains__(self, number: int) -> bool:
        place = number >> 3
        return place < len(self._bits) and bool(self._bits[place] & 1 << (number & 7))


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


@dataclass(slots=True, kw_only=True)
class Earlier:
    """What earlier runs wrote: by line number, or by id where a record has no number."""

    done: Bitmap = field(default_factory=Bitmap)
    failed: Bitmap = field(default_factory=Bitmap)
    done_ids: IdIndex | None = None
    failed_ids: IdIndex | None = None
    records: int = 0
    failures: int = 0
    last_line: int = 0

    def answered(self, number: int, *, retry_errors: bool) -> bool:
        """Tell whether line `number` has a record that stays."""
        return number in self.done or (not retry_errors and number in self.failed)

    def answered_id(self, custom_id: str, *, retry_errors: bool) -> bool:
        if self.done_ids is not None and custom_id in self.done_ids:
            return True
        return not retry_errors and self.failed_ids is not None and custom_id in self.failed_ids

    @property
    def has_ids(self) -> bool:
        return self.done_ids is not None or self.failed_ids is not None

    def add(self, record: Mapping[str, Any]) -> None:
        """Take one record.

        Raises:
            InputError: it names neither line nor id.
        """
        good, number, custom_id = is_success(record), line_of(record), record.get("custom_id")
        self.records += 1
        self.failures += not good
        if number is not None:
            (self.done if good else self.failed).add(number)
            self.last_line = max(self.last_line, number)
        elif isinstance(custom_id, str):
            self._add_id(custom_id, good=good)
        else:
            raise InputError("a record names neither its line nor its custom_id")

    def _add_id(self, custom_id: str, *, good: bool) -> None:
        if good:
            self.done_ids = self.done_ids or IdIndex()
            self.done_ids.add(custom_id)
        else:
            self.failed_ids = self.failed_ids or IdIndex()
            self.failed_ids.add(custom_id)


def scan(lines: Iterable[bytes], name: str) -> Earlier:
    """Read all records of an output whose last line is whole.

    Raises:
        InputError: a line is no record.
    """
    earlier = Earlier()
    for number, record in _records(lines, name):
        try:
            earlier.add(record)
        except InputError as error:
            raise _no_record(name, number, error.message) from error
    return earlier


def successes(lines: Iterable[bytes], name: str) -> Iterator[bytes]:
    """Yield the lines that hold answers, as they are."""
    for line in lines:
        if any(is_success(record) for _, record in _records([line], name)):
            yield line


def is_success(record: Mapping[str, Any]) -> bool:
    """Tell an answer from a failure.

    Failures met in the wild: `error` as object or text with `response` null (OpenAI, expired); a status of 4xx or 5xx
    with `response.body.error` and `error` null (OpenAI's error files); `error` beside a `response` without a body
    (vLLM); a body that is an error itself (`object: error`, older vLLM).
    """
    response = record.get("response")
    if record.get("error") or not isinstance(response, dict):
        return False
    body, status = response.get("body"), response.get("status_code")
    if not isinstance(body, dict) or body.get("error") or body.get("object") == "error":
        return False
    return isinstance(status, int) and 200 <= status < 300


def line_of(record: Mapping[str, Any]) -> int | None:
    """Return the number of the input line that a record of ours answers."""
    extra = record.get("trimkv")
    if not isinstance(extra, dict):
        response = record.get("response")
        body = response.get("body") if isinstance(response, dict) else None
        extra = body.get("trimkv") if isinstance(body, dict) else None
    number = extra.get("line") if isinstance(extra, dict) else None
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def _records(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise _no_record(name, number, error.msg) from error
        if not isinstance(record, dict):
            raise _no_record(name, number, "it is no JSON object")
        yield number, record


def _no_record(name: str, number: int, reason: str) -> InputError:
    return InputError(
        f"line {number} of {name} is no result: {reason}", hint="give another -o, or --overwrite to start anew"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Every `of`-th line, from the `index`-th on (from 1)."""

    index: int = 1
    of: int = 1

    def __contains__(self, number: int) -> bool:
        return (number - self.index) % self.of == 0


def parse_shard(text: str) -> Shard:
    """Read `--shard`: `2/4` is the second of four.

    Raises:
        UsageError: no such thing.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text} is no part of a whole", hint="write it like 1/4, 2/4, 3/4 and 4/4")
    return Shard(index=int(match[1]), of=int(match[2]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Say which lines are left to run."""

    limit: int | None = None  # lines that are not blank
    shard: Shard = Shard()
    earlier: Earlier = field(default_factory=Earlier)
    retry_errors: bool = False
    in_order: bool = False  # the output has to stay in the input's order


def parse_lines(
    lines: Iterable[Line], rules: Rules, selection: Selection | None = None, summary: Summary | None = None
) -> Iterator[Item | BadLine]:
    """Parse the lines that are left; the second line with an id is a bad one, whichever of them are left.

    Raises:
        UsageError: a line that is left comes before one that is written, and the output has to stay in order.
    """
    selection, summary = selection or Selection(), summary or Summary()
    ids = IdIndex() if rules.has_ids else None
    for line in islice(lines, selection.limit):
        if _is_left(line, rules, selection, summary):
            if selection.in_order and line.number < selection.earlier.last_line:
                raise UsageError(
                    f"the output is not in the input's order: line {line.number} is missing before later ones",
                    hint="--order completion goes on all the same",
                )
            parsed = parse_line(line, rules)
            yield parsed if _is_new(ids, parsed.custom_id) else duplicate(line.number, parsed.custom_id or "")
        elif ids is not None and (custom_id := id_of(line, rules)) is not None:
            ids.note(custom_id)


def _is_new(ids: IdIndex | None, custom_id: str | None) -> bool:
    return ids is None or custom_id is None or ids.add(custom_id)


def _is_left(line: Line, rules: Rules, selection: Selection, summary: Summary) -> bool:
    if line.number not in selection.shard:
        return False
    earlier, retry = selection.earlier, selection.retry_errors
    answered = earlier.answered(line.number, retry_errors=retry)
    if not answered and earlier.has_ids and (custom_id := id_of(line, rules)) is not None:
        answered = earlier.answered_id(custom_id, retry_errors=retry)
    if not answered:
        return True
    if line.number in earlier.failed and line.number not in earlier.done:
        summary.failed_before += 1
    else:
        summary.skipped += 1
    return False
