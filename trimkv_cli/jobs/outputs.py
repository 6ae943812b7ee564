"""An output file that a job goes on with: what it holds, what made it, and how far its input was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from trimkv_cli.jobs.resuming import (
    Covered,
    Sidecar,
    check_beginning,
    check_provenance,
    path_beside,
    read_earlier,
    read_sidecar,
    write_sidecar,
)
from trimkv_cli.jobs.selection import Earlier


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A file of records; `before` is None where nothing was answered, or nobody knows by what."""

    path: Path
    before: Sidecar | None = None
    earlier: Earlier = field(default_factory=Earlier)

    @classmethod
    def taken_up(cls, path: Path, *, adopt: bool = False) -> Output:
        """Repair an output and read what it holds; `adopt` takes one of which nobody knows what made it.

        Raises:
            InputError: nobody knows that, a line is no record, or the sidecar is damaged.
            TrimkvError: it cannot be read and written.
        """
        before = read_sidecar(path_beside(path))
        check_provenance(path, has_sidecar=before is not None, adopt=adopt)
        earlier = read_earlier(path)
        return cls(path=path, before=before if earlier.records else None, earlier=earlier)

    def same_input(self, stream: BinaryIO) -> BinaryIO:
        """Return a stream with the same content, once it is known to begin with what was read before.

        Raises:
            UsageError: it does not.
        """
        if self.before is None:
            return stream
        return check_beginning(stream, self.before.input_bytes, self.before.input_sha256)

    def claim(self, fingerprint: Mapping[str, str]) -> Covered:
        """Write what the output will be known by; return what is to be told how far the input has been read.

        Raises:
            TrimkvError: it cannot be written.
        """
        path = path_beside(self.path)
        sidecar = replace(self.before or Sidecar(fingerprint=fingerprint), fingerprint=fingerprint)
        write_sidecar(path, sidecar)

        def covered(count: int, sha256: str) -> None:
            if count > sidecar.input_bytes:
                write_sidecar(path, replace(sidecar, input_bytes=count, input_sha256=sha256))

        return covered
