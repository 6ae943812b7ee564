"""Homes that cannot be written and folders that are gone: nothing has to be written, so nothing fails."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import pytest

from helpers.programs import COMMAND, ENVIRONMENT

ALONE = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override"]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """Return a home that nobody can write into, not even root without its privileges."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o555)
    yield tmp_path / "home"
    (tmp_path / "home").chmod(0o755)


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    start = ALONE if os.geteuid() == 0 else []
    environment = {
        name: value for name, value in ENVIRONMENT.items() if not name.startswith(("XDG_", "TORCHINDUCTOR_"))
    }
    return subprocess.run(
        [*start, *COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**environment, "HOME": str(home)},
        check=False,
        timeout=120,
    )


@pytest.mark.skipif(os.geteuid() == 0 and not which("setpriv"), reason="root writes anywhere, and setpriv is missing")
@pytest.mark.parametrize("line", [["ask", "My cat is called Zubo.", "-n", "4"], ["doctor"]])
def test_a_home_that_cannot_be_written_stops_nothing(home: Path, line: list[str]) -> None:
    """Catches a folder for caches that is made before it is needed, and whose failure is fatal."""
    done = run(home, *line)
    assert done.returncode == 0, done.stderr.decode()
    assert not list(home.iterdir())


def test_a_folder_that_is_gone_is_told_in_a_sentence(tmp_path: Path) -> None:
    """Catches a FileNotFoundError without a name, or a library that ends the process, from every command."""
    script = f'mkdir gone && cd gone && rmdir "{tmp_path}/gone" && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *COMMAND, "plan", "mini"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.decode().startswith("error: the folder that this was started in is gone\nhint: ")
