"""An earlier output taken up again: its end repaired, other writers kept away, and the sidecar of its origin."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from trimkv_cli.errors import InputError, TrimkvError, UsageError
from trimkv_cli.files import cannot_write, whole_file, writing
from trimkv_cli.jobs.lines import Rules
from trimkv_cli.jobs.packing import Broken, Frame, Packing, Unpacked, packing_of, unpacked
from trimkv_cli.jobs.reading import read_some
from trimkv_cli.jobs.selection import Earlier, scan, successes

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

    lock = FileLock(output.with_name(f"{output.name}.trimkv.lock"), timeout=0, thread_local=False)
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


FORMAT = 1
_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "top_h",
    "repetition_penalty",
    "stop",
    "ignore_eos",
)
_LIBRARIES = ("torch", "transformers", "tokenizers")
CHOSEN = ("deterministic", "on_overflow")  # options that change tokens, and of which no plan knows


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """What changes the tokens of a job, by name, and how much of the input has been read (unpacked bytes)."""

    fingerprint: Mapping[str, str]
    input_bytes: int = 0
    input_sha256: str = ""


def path_beside(output: Path) -> Path:
    """Return where an output's sidecar lies."""
    return output.with_name(f"{output.name}.trimkv.json")


def job_fingerprint(
    engine: Mapping[str, str], rules: Rules, *, template: str, choices: Mapping[str, object], prompt_column: str | None
) -> dict[str, str]:
    """Name everything that decides a job's tokens: `engine` is the engine's own fingerprint, `choices` the user's."""
    sampling = {name: str(getattr(rules.defaults, name)) for name in _SAMPLING}
    versions = {name: version(name) for name in _LIBRARIES}
    return {
        **engine,
        **versions,
        "template": template,
        **{name: str(value) for name, value in choices.items()},
        "think": str(rules.think),
        "input_format": f"column {prompt_column}" if prompt_column else "text" if rules.text else "jsonl",
        "seed": str(rules.defaults.seed),
        **({"special_tokens": "True"} if rules.special_tokens else {}),
        **({} if rules.defaults.think_budget is None else {"think_budget": str(rules.defaults.think_budget)}),
        **sampling,
    }


def check_fingerprint(output: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise when a job would go on with other tokens than it began with.

    Raises:
        UsageError: naming each field that differs.
    """
    if changed := differences(before, now):
        raise UsageError(
            f"{output} was made with other settings: {', '.join(changed)}",
            hint="give the same settings, another -o, or --overwrite to start anew",
        )


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Say what differs between two fingerprints, field by field."""
    names = [*before, *(name for name in now if name not in before)]
    return [
        f"{name} ({before.get(name)} before, {now.get(name)} now)"
        for name in names
        if before.get(name) != now.get(name)
    ]


def read_sidecar(path: Path) -> Sidecar | None:
    """Read a sidecar; None where there is none.

    Raises:
        InputError: it is damaged, or of another format.
    """
    try:
        data: Any = orjson.loads(path.read_bytes())
        known = {field.name for field in fields(Sidecar)}
        if data["format"] != FORMAT:
            raise InputError(f"{path} has format {data['format']}, and this trimkv reads {FORMAT}")
        return Sidecar(**{name: value for name, value in data.items() if name in known})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"cannot read {path}: {error}", hint="--overwrite starts anew") from error


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Replace a sidecar as a whole.

    Raises:
        UsageError: the folder cannot be written to.
        TrimkvError: the disk is full.
    """
    with whole_file(path, hint="give another file to -o") as partial:
        partial.write_bytes(orjson.dumps({"format": FORMAT, **asdict(sidecar)}, option=orjson.OPT_INDENT_2) + b"\n")


_LARGE_BLOCK = 1 << 20

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
    return cast(BinaryIO, io.BufferedReader(ReadInput(stream, covered), _LARGE_BLOCK))


def hash_all(stream: BinaryIO, covered: Covered) -> BinaryIO:
    """Read a file to its end for `covered`, and return it at its beginning; for formats that are read at random."""
    digest, count = hashlib.sha256(), 0
    while block := stream.read(_LARGE_BLOCK):
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
    while left and (block := read_some(stream, min(left, _LARGE_BLOCK))):
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
    return cast(BinaryIO, io.BufferedReader(_Chain(cast(BinaryIO, kept), stream), _LARGE_BLOCK))


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
