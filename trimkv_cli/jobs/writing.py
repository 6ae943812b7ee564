"""The output of a job: records written in one piece each, as they come or in the order of the input."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from trimkv_cli.errors import TrimkvError, UsageError
from trimkv_cli.files import writing
from trimkv_cli.jobs.packing import Frame, Packing, packing_of

Order = Literal["completion", "input"]

_FRAME_BYTES = 1 << 20  # of records: what is packed again when the last frame was cut off


def check_output(output: str, source: BinaryIO) -> None:
    """Refuse an output that would destroy the input ("-" = stdout), or that no file can be.

    Raises:
        UsageError: it is the input, or lies in no folder.
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


def is_resumable(output: str) -> bool:
    """Tell whether an output is, or will be, a file that can be read again."""
    return output != "-" and (Path(output).is_file() or not Path(output).exists())


class RecordStream(Protocol):
    """Takes records one by one; each is handed to the system before `write` returns."""

    def write(self, data: bytes) -> None: ...


class _Plain:
    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name

    def write(self, data: bytes) -> None:
        _write_all(self._stream, data, self._name)


class _Packed:
    def __init__(self, stream: BinaryIO, packing: Packing, name: str) -> None:
        self._stream = stream
        self._name = name
        self._packing = packing
        self._frame: Frame | None = None

    def write(self, data: bytes) -> None:
        self._frame = self._frame or Frame(self._packing)
        _write_all(self._stream, self._frame.pack(data), self._name)
        if self._frame.packed_bytes >= _FRAME_BYTES:
            self.end()

    def end(self) -> None:
        if self._frame is not None:
            frame, self._frame = self._frame, None
            _write_all(self._stream, frame.finish(), self._name)


@contextmanager
def open_output(output: str) -> Iterator[RecordStream]:
    """Open an output to append to; `.gz` and `.zst` are packed.

    Raises:
        UsageError: it cannot be opened.
    """
    if output == "-":
        yield _Plain(sys.stdout.buffer, output)
        return
    with writing(output, hint="give another file to -o"):
        stream = Path(output).open("ab", buffering=0)  # noqa: SIM115  closed below
    packing = packing_of(output)
    with stream:
        if packing is None:
            yield _Plain(stream, output)
            return
        packed = _Packed(stream, packing, output)
        try:
            yield packed
        finally:
            packed.end()


class Writer:
    """Write encoded records; under order "input" a record waits until all before it are written.

    Raises:
        TrimkvError: the disk is full, or gone.
        BrokenPipeError: nobody reads the output any more.
    """

    def __init__(self, output: RecordStream, *, order: Order = "completion") -> None:
        self._output = output
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
            self._output.write(data)
            return
        self._held[index] = data
        while (ready := self._held.pop(self._next, None)) is not None:
            self._next += 1
            self._output.write(ready)


def _write_all(stream: BinaryIO, data: bytes, name: str) -> None:
    """Hand all bytes to the system; an unbuffered stream may take them in several bites."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[stream.write(rest) :]
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise TrimkvError(
            f"cannot write {'stdout' if name == '-' else name}: {error.strerror}", hint=_full_hint(name)
        ) from error


def _full_hint(output: str) -> str:
    if not is_resumable(output):
        return "-o FILE on a disk with room for it, which can be resumed as well"
    return "the records written so far are whole, except perhaps the last; make room, and the same command resumes"


def _same_file(status: os.stat_result, source: BinaryIO) -> bool:
    return stat.S_ISREG(status.st_mode) and os.path.samestat(status, os.fstat(source.fileno()))
