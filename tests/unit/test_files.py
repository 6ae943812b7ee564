"""Mistakes in writing files: halves of one, an earlier one lost, and a full disk told as a mistake of the user's."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from trimkv_cli import files
from trimkv_cli.cache import gate_files
from trimkv_cli.chat.store import SessionStore, Transcript
from trimkv_cli.commands import inspect
from trimkv_cli.errors import TrimkvError, UsageError
from trimkv_cli.files import whole_file
from trimkv_cli.jobs.resuming import Sidecar, drop_failures, write_sidecar
from trimkv_cli.jobs.writing import open_output
from trimkv_cli.model import machine


def write(path: Path, text: str, *, private: bool = False) -> None:
    with whole_file(path, private=private) as partial:
        partial.write_text(text)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system find out that the disk is full when what was written has to be safe there."""

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write(path, "first")
    with pytest.raises(TypeError), whole_file(path) as partial:
        partial.write_text(5)  # type: ignore[arg-type]
    assert (path.read_text(), list(tmp_path.iterdir())) == ("first", [path])


def test_what_a_kill_left_behind_is_used_up(tmp_path: Path) -> None:
    """Catches folders that fill with halves of files."""
    (tmp_path / ".a.json.partial").write_text("half")
    write(tmp_path / "a.json", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a power cut that leaves an empty file: the name changed before the content was safe."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def noted_replace(self: Path, target: Path) -> Path:
        done.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write(tmp_path / "a.json", "text")
    assert done == ["file", "replace", "folder"]


def test_what_only_its_owner_may_read_and_what_others_may(tmp_path: Path) -> None:
    """Catches conversations that others can read, and an output that its group cannot read any more."""
    write(tmp_path / "private", "x", private=True)
    write(tmp_path / "open", "x")
    (tmp_path / "open").chmod(0o664)
    write(tmp_path / "open", "y")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"private": 0o600, "open": 0o664}


def test_a_link_goes_on_to_point_where_it_did_and_a_device_is_written_as_it_stands(tmp_path: Path) -> None:
    """Catches a link that becomes a file, and /dev/stdout that is to be replaced by one."""
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "a")
    write(link, "x")
    assert (link.is_symlink(), (tmp_path / "real" / "a").read_text()) == (True, "x")
    with whole_file(Path("/dev/null")) as place:
        assert place == Path("/dev/null")


def rows(path: Path) -> None:
    with whole_file(path) as partial:
        save_file({"a": torch.zeros(8)}, partial)


def session(path: Path) -> None:
    store = SessionStore(path.parent)
    store.create(path.name)
    store.write(Transcript(name=path.name, model="m", fingerprint={}))


def failures(path: Path) -> None:
    path.write_bytes(b"")
    drop_failures(path)


def stored(path: Path) -> None:
    machine.store(machine.Machine(cpu_runtime_bytes=1))


WRITERS: list[Callable[[Path], None]] = [
    rows,
    session,
    failures,
    stored,
    lambda path: write(path, "x"),
    lambda path: write_sidecar(path, Sidecar(fingerprint={})),
    lambda path: gate_files._write(path, lambda partial: partial.write_text("x")),
    lambda path: inspect._write(str(path), "x", "--html"),
]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_a_failure_at_run_time_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: None, writer: Callable[[Path], None]
) -> None:
    """Catches exit code 2, which means a mistake in the command line, and a message without the file's name."""
    monkeypatch.setattr(machine, "_file", lambda: tmp_path / "out")
    with pytest.raises(TrimkvError, match=rf"cannot write {tmp_path}/out.*: No space left on device") as caught:
        writer(tmp_path / "out")
    assert (caught.value.exit_code, isinstance(caught.value, UsageError)) == (1, False)
    assert "room" in (caught.value.hint or "")
    assert not [path for path in tmp_path.rglob(".*") if path.is_file() and path.suffix != ".lock"]


def test_what_a_library_in_rust_says_of_a_full_disk_is_understood() -> None:
    """Catches safetensors' own error, which is no OSError, passed on as an unexpected fault."""
    told = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    error = files.cannot_write("a.kv", told)
    assert error is not None
    assert (error.message, error.exit_code) == ("cannot write a.kv: No space left on device", 1)


@pytest.mark.parametrize("place", ["no folder/a", ".", "a" * 300])
def test_a_place_that_cannot_be_is_a_mistake_of_the_command_line(tmp_path: Path, place: str) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        write(tmp_path / place, "x")


def test_what_is_about_something_else_is_passed_on() -> None:
    assert files.cannot_write("a", ValueError("no")) is None
    assert files.cannot_write("a", BrokenPipeError(errno.EPIPE, "x")) is None


@pytest.mark.parametrize(("output", "hint"), [("/dev/full", "-o FILE"), ("-", "-o FILE")])
def test_records_for_a_full_device_are_not_told_to_resume(
    monkeypatch: pytest.MonkeyPatch, output: str, hint: str
) -> None:
    """Catches "the same command resumes" for an output that cannot be read again."""
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr("sys.stdout", type("Stdout", (), {"buffer": full}))
        with pytest.raises(TrimkvError, match="No space left") as caught, open_output(output) as out:
            out.write(b"{}")
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith(f"cannot write {'stdout' if output == '-' else output}: ")
    assert hint in (caught.value.hint or "")
    assert "same command" not in (caught.value.hint or "")
