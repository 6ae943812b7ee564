"""Notes of running servers in the user's runtime folder: where each answers, with which key, and what it runs."""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimkv_cli.serve.about import About

_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One running server."""

    pid: int
    started: str  # of the process, so that another one with its number is not taken for it
    url: str
    about: About
    api_key: str | None = None

    @property
    def port(self) -> int:
        """Return where it listens."""
        return int(self.url.rpartition(":")[2])

    @property
    def alive(self) -> bool:
        """Say whether its process is there."""
        return process_start(self.pid) == self.started

    @classmethod
    def of(cls, *, url: str, api_key: str | None, about: About) -> Note:
        """Return the note of this process."""
        return cls(pid=os.getpid(), started=process_start(os.getpid()) or "", url=url, about=about, api_key=api_key)

    @classmethod
    def from_json(cls, data: Any) -> Note | None:
        """Read what was written; None for anything else."""
        if not isinstance(data, dict):
            return None
        about, key = About.from_json(data.get("about")), data.get("api_key")
        kinds = [isinstance(data.get(name), kind) for name, kind in (("pid", int), ("started", str), ("url", str))]
        if about is None or not all(kinds) or not isinstance(key, str | None) or data["pid"] < 1:
            return None
        if not data["url"].rpartition(":")[2].isdigit():
            return None
        return cls(pid=data["pid"], started=data["started"], url=data["url"], about=about, api_key=key)


@contextmanager
def noted(note: Note) -> Iterator[None]:
    """Keep a note while entered, where there is a place for it."""
    path = _write(note)
    try:
        yield
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


def running() -> list[Note]:
    """Return the notes of servers whose processes are there, by port; sweep away those of others."""
    found = []
    for folder in _folders():
        for path in folder.glob("serve-*.json") if _is_private(folder) else ():
            note = _read(path)
            if note is not None and note.alive:
                found.append(note)
            elif note is not None:
                with suppress(OSError):
                    path.unlink()
    return sorted(found, key=lambda note: note.port)


def process_start(pid: int) -> str | None:
    """Say when a process began, in a form that no other with its number shares; None when it is gone."""
    stat_file, boot = Path(f"/proc/{pid}/stat"), Path("/proc/sys/kernel/random/boot_id")
    if boot.exists():
        try:
            values = stat_file.read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if values[0] in "ZX" else f"{boot.read_text('ascii').strip()}:{values[19]}"
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return None


def _folders() -> tuple[Path, ...]:
    from platformdirs import user_runtime_path, user_state_path

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a system that has no such folder: one below the temporary files will do
        runtime = user_runtime_path("trimkv")
    return runtime, user_state_path("trimkv") / "run"


def _write(note: Note) -> Path | None:
    """Write a note into the first folder that takes it."""
    data = {"pid": note.pid, "started": note.started, "url": note.url, "api_key": note.api_key}
    text = json.dumps({**data, "about": note.about.to_json()})
    for folder in _folders():
        path = folder / f"serve-{note.pid}.json"
        partial = path.with_suffix(".partial")
        try:
            folder.mkdir(0o700, parents=True, exist_ok=True)
            if not _is_private(folder):
                continue
            partial.unlink(missing_ok=True)
            with os.fdopen(
                os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
            ) as file:
                file.write(text)
            partial.replace(path)
        except OSError:
            continue
        return path
    return None


def _read(path: Path) -> Note | None:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
            if not _is_ours(os.fstat(file.fileno())):
                return None
            return Note.from_json(json.loads(file.read(_MOST_BYTES)))
    except (OSError, ValueError, RecursionError):
        return None


def _is_private(folder: Path) -> bool:
    """Say whether nobody else can write into a folder, or have it lie elsewhere."""
    try:
        return _is_ours(folder.lstat())
    except OSError:
        return False


def _is_ours(found: os.stat_result) -> bool:
    if os.name != "posix":
        return True
    return found.st_uid == os.getuid() and not stat.S_ISLNK(found.st_mode) and not found.st_mode & 0o077
