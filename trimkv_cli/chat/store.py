"""Sessions on disk: a folder each with a transcript and the latest states of the cache; plain files, no torch."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import orjson
from filelock import BaseFileLock, FileLock, Timeout

from trimkv_cli.chat.turns import Turn, turns_from_json
from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.files import sync, whole_file, writing

FORMAT_VERSION = 1
TRANSCRIPT = "session.json"
_ELSEWHERE = "--no-history keeps nothing"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """What a session's file holds: what was said, with what, and the files of the states that are left."""

    name: str
    model: str
    fingerprint: Mapping[str, str]
    system: str | None = None
    think: bool | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # engine options, to open the session again
    turns: tuple[Turn, ...] = ()
    states: Mapping[int, str] = field(default_factory=dict)  # turns behind it → file in the session's folder
    created: float = 0.0
    updated: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            "format": FORMAT_VERSION,
            **values,
            "turns": [turn.to_json() for turn in self.turns],
            "states": {str(count): name for count, name in self.states.items()},
        }

    @classmethod
    def from_json(cls, value: Any) -> Transcript:
        """Read what `to_json` made.

        Raises:
            InputError: it is something else, or of another version.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT_VERSION:
            raise InputError("not a session that this version of trimkv reads")
        value = {name: content for name, content in value.items() if name != "format"}
        try:
            states = {int(count): Path(str(name)).name for count, name in value.pop("states").items()}
            return cls(**{**value, "turns": tuple(turns_from_json(value["turns"])), "states": states})
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise InputError(f"not a session: {error}") from None


class SessionStore:
    """The folder with all sessions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def default(cls) -> SessionStore:
        """Return the store in the user's data folder."""
        from platformdirs import user_data_path

        return cls(user_data_path("trimkv") / "sessions")

    def path(self, name: str) -> Path:
        """Return a session's folder, which may not exist.

        Raises:
            UsageError: a name that could not be a folder's on every system.
        """
        if not _NAME.fullmatch(name) or name.endswith("."):
            raise UsageError(
                f"{name!r} is no name for a session",
                hint="letters, digits, '.', '_' and '-', at most 64, the first a letter or digit",
            )
        return self.folder / name

    def names(self) -> list[str]:
        """List the sessions, the last one used first."""
        found = [path.parent for path in self.folder.glob(f"*/{TRANSCRIPT}")]
        used = {path.name: (path / TRANSCRIPT).stat().st_mtime_ns for path in found}
        return sorted(used, key=lambda name: (-used[name], name))

    def exists(self, name: str) -> bool:
        """Say whether there is a session of this name; raises as `path` does."""
        return (self.path(name) / TRANSCRIPT).is_file()

    def read(self, name: str) -> Transcript:
        """Read a session.

        Raises:
            UsageError: there is none of this name.
            InputError: its file is damaged.
        """
        path = self.path(name) / TRANSCRIPT
        if not path.is_file():
            raise UsageError(f"there is no session {name}", hint="trimkv sessions list")
        try:
            return replace(Transcript.from_json(orjson.loads(path.read_bytes())), name=name)  # folders may be renamed
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {error}", hint=f"trimkv sessions rm {name}") from error
        except InputError as error:
            raise InputError(f"{path}: {error.message}", hint=f"trimkv sessions rm {name}") from error

    def write(self, transcript: Transcript) -> None:
        """Write a session's transcript; it appears whole or not at all. Its folder must exist (`create`)."""
        folder = self.path(transcript.name)
        with whole_file(folder / TRANSCRIPT, private=True) as partial, partial.open("w", encoding="utf-8") as file:
            json.dump(transcript.to_json(), file, ensure_ascii=False, indent=1)
        self._drop_others(folder, {*transcript.states.values()})

    def create(self, name: str | None = None) -> str:
        """Make a session's folder, by default one named by the time, and return its name.

        Raises:
            UsageError: the name is taken or is none.
        """
        _make_private(self.folder)
        for wanted in (name,) if name is not None else _names_by_time():
            try:
                with writing(self.path(wanted), hint=_ELSEWHERE):
                    self.path(wanted).mkdir(mode=0o700)
            except UsageError:
                if not self.path(wanted).exists():
                    raise
                continue
            return wanted
        raise UsageError(f"there is a session {name} already", hint="take another name, or trimkv sessions rm it")

    def free_name(self, name: str) -> str:
        """Return the first of NAME-2, NAME-3, … that no session has."""
        stem = re.sub(r"-\d{1,3}$", "", name)[:58]
        return next(free for n in count(2) if not self.path(free := f"{stem}-{n}").exists())

    def copy(self, source: str, target: str) -> str:
        """Make a session `target` with what `source` holds now, and return its name.

        Raises:
            UsageError: no such session, or the name is taken.
        """
        transcript = self.read(source)
        self.create(target)
        for name in transcript.states.values():
            if (self.path(source) / name).is_file():
                with writing(self.path(target) / name):
                    shutil.copyfile(self.path(source) / name, self.path(target) / name)
                    sync(self.path(target) / name)
        self.write(replace(transcript, name=target, updated=time.time()))
        return target

    def rename(self, source: str, target: str) -> BaseFileLock:
        """Call a session otherwise, and return the lock of its new name.

        Raises:
            UsageError: the name is taken or is none.
        """
        place = self.path(target)
        if place.exists():
            raise UsageError(f"there is a session {target} already", hint="take another name")
        lock = self.lock(target)
        self.path(source).rename(place)
        return lock

    def remove(self, name: str) -> None:
        """Delete a session.

        Raises:
            UsageError: there is none, or it is open.
        """
        folder = self.path(name)
        if not folder.is_dir():
            raise UsageError(f"there is no session {name}", hint="trimkv sessions list")
        lock = self.lock(name)
        try:
            shutil.rmtree(folder)
        finally:
            lock.release()

    def lock(self, name: str) -> BaseFileLock:
        """Take a session for this process until the lock is released.

        Raises:
            UsageError: another process has it open.
        """
        _make_private(self.folder)
        lock = FileLock(self.folder / f".{self.path(name).name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            hint = f"trimkv sessions fork {name} {name}-2 makes a copy to go on with"
            raise UsageError(f"session {name} is open in another chat", hint=hint) from None
        return lock

    def _drop_others(self, folder: Path, kept: set[str]) -> None:
        """Delete states that the transcript does not name any more, and what an earlier crash left."""
        for path in folder.iterdir():
            if path.name != TRANSCRIPT and path.name not in kept:
                path.unlink(missing_ok=True)


def _names_by_time() -> Iterator[str]:
    first = time.strftime("%Y-%m-%d-%H%M%S")
    yield first
    yield from (f"{first}-{number}" for number in range(2, 1000))


def _make_private(folder: Path) -> None:
    with writing(folder, hint=_ELSEWHERE):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
