"""Makes sure that an input begins as the one that an earlier run read, and remembers how far this run has read."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from trimkv_cli.errors import UsageError
from trimkv_cli.jobs.reading import read_some

_BLOCK = 1 << 20

Covered = Callable[[int, str], None]  # bytes read and their sha256: called before any of them is handed on


class ReadInput(io.RawIOBase):
    """Hand a stream on block by block, telling `covered` first what has been read in all.

    A last line without a newline counts as if it had one: the input may grow by lines, not within one.
    """

    def __init__(self, stream: BinaryIO, covered: Covered) -> None:
        self._stream = stream
        self._covered = covered
        self._sha256 = hashlib.sha256()
        self._bytes = 0
        self._open_line = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = read_some(self._stream, len(buffer))
        self._take(block or (b"\n" if self._open_line else b""))
        buffer[: len(block)] = block
        return len(block)

    def close(self) -> None:
        self._stream.close()
        super().close()

    def _take(self, block: bytes) -> None:
        if block:
            self._sha256.update(block)
            self._bytes += len(block)
            self._open_line = not block.endswith(b"\n")
            self._covered(self._bytes, self._sha256.hexdigest())


def remembering(stream: BinaryIO, covered: Covered) -> BinaryIO:
    """Return `stream` as `ReadInput` hands it on, in large blocks."""
    return cast(BinaryIO, io.BufferedReader(ReadInput(stream, covered), _BLOCK))


def hash_all(stream: BinaryIO, covered: Covered) -> BinaryIO:
    """Read a file to its end for `covered`, and return it at its beginning; for formats that are read at random."""
    digest, count = hashlib.sha256(), 0
    while block := stream.read(_BLOCK):
        digest.update(block)
        count += len(block)
    covered(count, digest.hexdigest())
    stream.seek(0)
    return stream


def check_beginning(stream: BinaryIO, count: int, sha256: str) -> BinaryIO:
    """Return a stream with the same content after reading its first `count` bytes; a pipe's are kept on disk meanwhile.

    Raises:
        UsageError: they are not those whose hash is `sha256`.
    """
    if count == 0:
        return stream
    kept = None if stream.seekable() else tempfile.TemporaryFile()  # noqa: SIM115  closed with the stream
    digest, left, last = hashlib.sha256(), count, b"\n"
    while left and (block := read_some(stream, min(left, _BLOCK))):
        digest.update(block)
        left, last = left - len(block), block
        if kept is not None:
            kept.write(block)
    if left == 1 and not last.endswith(b"\n"):
        digest.update(b"\n")  # as ReadInput counts the end
        left = 0
    if left or digest.hexdigest() != sha256:
        if kept is not None:
            kept.close()
        raise UsageError(
            "the input does not begin as the one that the output answers",
            hint="give the same input (more lines may follow), another -o, or --overwrite to start anew",
        )
    if kept is None:
        stream.seek(0)
        return stream
    kept.seek(0)
    return cast(BinaryIO, io.BufferedReader(_Chain(cast(BinaryIO, kept), stream), _BLOCK))


class _Chain(io.RawIOBase):
    """Read one stream, then the other."""

    def __init__(self, *streams: BinaryIO) -> None:
        self._streams = list(streams)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._streams:
            if block := read_some(self._streams[0], len(buffer)):
                buffer[: len(block)] = block
                return len(block)
            self._streams.pop(0).close()
        return 0
