"""Writes records to a file or to stdout, each in one piece, as they come or in the order of the input."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from trimkv_cli.errors import TrimkvError, UsageError

Order = Literal["completion", "input"]


def check_output(output: str, source: BinaryIO, *, overwrite: bool) -> None:
    """Refuse an output that would destroy the input or an earlier result ("-" = stdout).

    Raises:
        UsageError: it is the input, exists already, or lies in no folder.
    """
    if output == "-":
        if _same_file(os.fstat(sys.stdout.fileno()), source):
            raise UsageError("stdout is the input file", hint="redirect to another file")
        return
    path = Path(output)
    if not path.parent.is_dir():
        raise UsageError(f"no folder {path.parent} to write {path.name} into", hint=f"mkdir -p {path.parent}")
    if path.is_dir():
        raise UsageError(f"{output} is a folder", hint=f"-o {path / 'out.jsonl'}")
    if path.exists() and _same_file(path.stat(), source):
        raise UsageError(f"{output} is the input file", hint="give another name to -o")
    if path.is_file() and not overwrite:
        raise UsageError(f"{output} exists", hint="--overwrite starts anew (resuming an output is not there yet)")


@contextmanager
def open_output(output: str, *, overwrite: bool) -> Iterator[BinaryIO]:
    """Open the output that `check_output` let pass.

    Raises:
        UsageError: it cannot be opened.
    """
    if output == "-":
        yield sys.stdout.buffer
        return
    path = Path(output)
    try:
        is_device = path.exists() and not path.is_file()
        stream = path.open("wb" if overwrite or is_device else "xb")
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}", hint="give another file to -o") from error
    with stream:
        yield stream


class Writer:
    """Write encoded records; under order "input" a record waits until all before it are written.

    Raises:
        TrimkvError: the disk is full, or gone.
        BrokenPipeError: nobody reads the output any more.
    """

    def __init__(self, stream: BinaryIO, *, order: Order = "completion") -> None:
        self._stream = stream
        self._in_order = order == "input"
        self._held: dict[int, bytes] = {}
        self._next = 0

    @property
    def held(self) -> int:
        """Count the records that wait for an earlier one."""
        return len(self._held)

    def write(self, index: int, data: bytes) -> None:
        """Write the record of the `index`-th line (from 0, without gaps) now or when its turn comes."""
        if not self._in_order:
            self._emit(data)
            return
        self._held[index] = data
        while (ready := self._held.pop(self._next, None)) is not None:
            self._next += 1
            self._emit(ready)

    def _emit(self, data: bytes) -> None:
        try:
            self._stream.write(data)
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            hint = "the records written so far are whole, except perhaps the last"
            raise TrimkvError(f"cannot write the output: {error.strerror}", hint=hint) from error


def _same_file(status: os.stat_result, source: BinaryIO) -> bool:
    return stat.S_ISREG(status.st_mode) and os.path.samestat(status, os.fstat(source.fileno()))
