"""`.gz` and `.zst`, frame by frame, so that what was flushed outlives a kill."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from trimkv_cli.errors import InputError

Packing = Literal["gz", "zst"]

_READ_BYTES = 1 << 14  # unpacks to at most 16 MiB of gzip
_GZIP = 31  # zlib's window size with a gzip header
_LEVEL = {"gz": 6, "zst": 3}


class Unpacker(Protocol):
    """The part of zlib's and zstandard's decompressors that both have."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class Broken(Exception):
    """A frame that is damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some bytes of a frame, unpacked; `end` is the packed offset after the frame when it is complete."""

    data: bytes
    end: int | None


def packing_of(name: str) -> Packing | None:
    """Return how a file of this name is packed."""
    suffix = Path(name).suffix
    return "gz" if suffix == ".gz" else "zst" if suffix == ".zst" else None


def unpacked(stream: BinaryIO, packing: Packing) -> Iterator[Piece]:
    """Yield the pieces of all frames of `stream`; the last one is incomplete when no piece with an `end` ends it.

    Raises:
        Broken: what follows is no frame.
    """
    offset, waiting, unpacker = 0, b"", _unpacker(packing)
    while data := waiting or stream.read(_READ_BYTES):
        content = _decompress(unpacker, data)
        waiting = unpacker.unused_data
        offset += len(data) - len(waiting)
        yield Piece(data=content, end=offset if unpacker.eof else None)
        unpacker = _unpacker(packing) if unpacker.eof else unpacker


def _unpacker(packing: Packing) -> Unpacker:
    if packing == "gz":
        return zlib.decompressobj(_GZIP)
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def _decompress(unpacker: Unpacker, data: bytes) -> bytes:
    import zstandard

    try:
        return unpacker.decompress(data)
    except (zlib.error, zstandard.ZstdError) as error:
        raise Broken(str(error)) from error


class Unpacked(io.RawIOBase):
    """Read a packed stream as if it were not.

    Raises:
        InputError: on reading what is damaged or cut off.
    """

    def __init__(self, stream: BinaryIO, packing: Packing, name: str) -> None:
        self._stream = stream
        self._name = name
        self._pieces = unpacked(stream, packing)
        self._data = memoryview(b"")
        self._complete = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._data:
            try:
                piece = next(self._pieces, None)
            except Broken as error:
                raise InputError(f"{self._name} is damaged: {error}", hint="pack it again") from error
            if piece is None:
                break
            self._data, self._complete = memoryview(piece.data), piece.end is not None
        if not self._data and not self._complete:
            raise InputError(f"{self._name} is cut off: its last frame has no end", hint="pack it again")
        count = min(len(buffer), len(self._data))
        buffer[:count] = self._data[:count]
        self._data = self._data[count:]
        return count

    def close(self) -> None:
        self._stream.close()
        super().close()


class Frame:
    """Pack one frame; what `pack` returned is enough to read everything packed so far."""

    def __init__(self, packing: Packing) -> None:
        self.packed_bytes = 0  # before packing
        self._packing = packing
        self._compressor: Any
        if packing == "gz":
            self._compressor = zlib.compressobj(_LEVEL[packing], zlib.DEFLATED, _GZIP)
        else:
            import zstandard

            self._compressor = zstandard.ZstdCompressor(level=_LEVEL[packing], write_checksum=True).compressobj()

    def pack(self, data: bytes) -> bytes:
        """Pack `data` and flush it."""
        self.packed_bytes += len(data)
        packed: bytes = self._compressor.compress(data)
        return packed + self._flush()

    def finish(self) -> bytes:
        ended: bytes = self._compressor.flush()  # both libraries end the frame by default
        return ended

    def _flush(self) -> bytes:
        if self._packing == "gz":
            flushed: bytes = self._compressor.flush(zlib.Z_SYNC_FLUSH)
        else:
            import zstandard

            flushed = self._compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        return flushed
