"""Takes an earlier output up again: repairs its end, learns what it holds, and keeps other writers away."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from trimkv_cli.errors import InputError, TrimkvError, UsageError
from trimkv_cli.files import cannot_write, whole_file, writing
from trimkv_cli.jobs.earlier import Earlier, scan, successes
from trimkv_cli.jobs.packing import Broken, Frame, Packing, Unpacked, packing_of, unpacked

_ANOTHER = "give another file to -o"
_BLOCK = 1 << 16
_MOST_IN_MEMORY = 1 << 23


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Forbid a second writer while this one works.

    Raises:
        UsageError: there is one already, or the folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(output.with_name(f"{output.name}.trimkv.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"another trimkv run writes {output}", hint="wait for it, or give another -o") from error
    except OSError as error:
        raise cannot_write(output, error, hint=_ANOTHER) or error from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: a waiting process sees that it is gone
        lock.release()


def read_earlier(output: Path) -> Earlier:
    """Repair the end of an output and read what it holds.

    Raises:
        InputError: a line of it is no record.
        TrimkvError: it cannot be read and written.
    """
    if not output.exists():
        return Earlier()
    try:
        repair(output)
        return scan(_lines(output), str(output))
    except OSError as error:
        raise TrimkvError(f"cannot take up {output}: {error.strerror}", hint=_ANOTHER) from error


def drop_failures(output: Path) -> None:
    """Replace an output by one that holds its answers alone, in one move.

    Raises:
        TrimkvError: it cannot be written.
    """
    packing = packing_of(output.name)
    with whole_file(output, hint=_ANOTHER) as partial, partial.open("wb") as stream:
        frame = None if packing is None else Frame(packing)
        for line in successes(_lines(output), str(output)):
            stream.write(line if frame is None else frame.pack(line))
        stream.write(b"" if frame is None else frame.finish())


def repair(output: Path) -> None:
    """Cut off what a kill left unfinished at the end, and keep it in `OUT.trimkv.torn`."""
    packing = packing_of(output.name)
    with output.open("r+b") as stream:
        if packing is None:
            _set_aside(output, stream, _end_of_lines(stream))
        else:
            _repair_packed(output, stream, packing)


def _end_of_lines(stream: BinaryIO) -> int:
    """Return the offset after the last newline, reading backwards."""
    end = stream.seek(0, 2)
    while end > 0:
        start = max(0, end - _BLOCK)
        stream.seek(start)
        newline = stream.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _set_aside(output: Path, stream: BinaryIO, keep: int) -> None:
    """Move everything from offset `keep` on to the file of torn ends."""
    stream.seek(keep)
    _keep_torn(output, stream.read())
    stream.truncate(keep)


def _keep_torn(output: Path, torn: bytes) -> None:
    if torn:
        with output.with_name(f"{output.name}.trimkv.torn").open("ab") as aside:
            aside.write(torn if torn.endswith(b"\n") else torn + b"\n")


def _repair_packed(output: Path, stream: BinaryIO, packing: Packing) -> None:
    """Pack the whole records of an unfinished last frame again, as a frame of their own."""
    keep, is_broken = 0, False
    with tempfile.SpooledTemporaryFile(_MOST_IN_MEMORY) as rescued:
        try:
            for piece in unpacked(stream, packing):
                rescued.write(piece.data)
                if piece.end is not None:
                    keep = piece.end
                    rescued.seek(0)
                    rescued.truncate()
        except Broken:
            is_broken = True
        if keep == stream.seek(0, 2):
            return
        rescued.seek(0)
        lines = list(rescued)
    if is_broken:
        _set_aside(output, stream, keep)
    if lines and not lines[-1].endswith(b"\n"):
        _keep_torn(output, lines.pop())
    frame = Frame(packing)
    stream.truncate(keep)
    stream.seek(keep)
    if lines:
        stream.write(b"".join([*(frame.pack(line) for line in lines), frame.finish()]))


def _lines(output: Path) -> Iterator[bytes]:
    packing = packing_of(output.name)
    with output.open("rb") as stream:
        if packing is None:
            yield from stream
        else:
            yield from io.BufferedReader(Unpacked(stream, packing, str(output)), _BLOCK)


def start_anew(output: Path) -> None:
    """Empty an output.

    Raises:
        UsageError: it cannot be written.
    """
    with writing(output, hint=_ANOTHER):
        output.open("wb").close()


def check_provenance(output: Path, *, has_sidecar: bool, adopt: bool) -> None:
    """Refuse to go on with an output of which nobody knows what made it.

    Raises:
        InputError: it holds something, and has no sidecar.
    """
    if output.is_file() and output.stat().st_size and not has_sidecar and not adopt:
        raise InputError(
            f"{output} exists, and no {output.name}.trimkv.json beside it says what made it",
            hint="--overwrite starts anew; --adopt goes on with it all the same",
        )
