"""The file beside an output that says what made it, and of which input."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.files import whole_file
from trimkv_cli.jobs.lines import Rules
from trimkv_cli.jobs.reading import read_some

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
        **sampling,
    }


def check_fingerprint(output: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise when a job would go on with other tokens than it began with.

    Raises:
        UsageError: naming each field that differs.
    """
    names = [*before, *(name for name in now if name not in before)]
    changed = [
        f"{name} ({before.get(name)} before, {now.get(name)} now)" for name in names if _differs(name, before, now)
    ]
    if changed:
        raise UsageError(
            f"{output} was made with other settings: {', '.join(changed)}",
            hint="give the same settings, another -o, or --overwrite to start anew",
        )


def _differs(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> bool:
    return before.get(name) != now.get(name)


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
