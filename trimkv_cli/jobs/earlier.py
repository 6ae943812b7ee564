"""Learns from an earlier output which lines are answered: ours, OpenAI's or vLLM's records, in all their shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from trimkv_cli.errors import InputError
from trimkv_cli.jobs.bitmap import Bitmap
from trimkv_cli.jobs.ids import IdIndex


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
        """Tell that by a line's id."""
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
