"""Mistakes with standard streams that are closed, full or cut, and bytes on stdout that depend on where they go."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from helpers.programs import COMMAND, ENVIRONMENT, Run, trimkv, trimkv_on_a_terminal

pytestmark = pytest.mark.slow

ASK = "ask hi -n 4 --greedy --ignore-eos --threads 1 -q"


def shell(arguments: str) -> subprocess.CompletedProcess[bytes]:
    line = f"'{COMMAND[0]}' -m trimkv_cli {arguments}"
    return subprocess.run(["sh", "-c", line], capture_output=True, env=ENVIRONMENT, timeout=120, check=False)


@pytest.fixture(scope="module")
def answer() -> bytes:
    return trimkv(*ASK.split()).stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("command", [ASK, f"{ASK} --json", "profiles list", "--help"])
def test_a_full_disk_is_an_error_line_and_1(command: str) -> None:
    """Catches a raw OSError, and an exit code of 0 for an answer that was lost."""
    done = shell(f"{command} >/dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == b"error: cannot write: No space left on device"
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_under_an_answer_is_told_with_the_file_s_name() -> None:
    """Catches a message that leaves open which of a command's files could not be written."""
    done = shell(f"{ASK} -o /dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == b"error: cannot write /dev/full: No space left on device"


@pytest.mark.parametrize("command", [ASK, "profiles list"])
def test_a_closed_stdout_is_an_error_unless_nothing_goes_there(command: str, tmp_path: Path) -> None:
    """Catches an answer that is lost in silence, and one refused although -o takes it."""
    done = shell(f"{command} >&-")
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, b"error: stdout is closed")
    if command == ASK:
        out = tmp_path / "answer.txt"
        assert shell(f"{ASK} -o {out} >&-").returncode == 0
        assert out.read_bytes()


def test_closed_stdin_and_stderr_do_not_reach_stdout(answer: bytes) -> None:
    """Catches notes that land on stdout, and a crash, where a stream is missing."""
    closed = shell(f"{ASK.replace(' -q', '')} <&- 2>&-")
    assert closed.returncode == 0
    assert closed.stdout == answer


def test_a_dumb_terminal_gets_the_same_bytes(answer: bytes) -> None:
    """Catches cursor codes on a terminal that has none, on stdout and stderr together."""
    shown = trimkv_on_a_terminal(*ASK.split(), environment={"TERM": "dumb", "FORCE_COLOR": "1"})
    assert shown.replace(b"\r\n", b"\n") == answer


def test_quiet_keeps_warnings_and_help_says_so(here: Run) -> None:
    """Catches a help text that promises silence, and a warning that -q swallows."""
    help_text = " ".join(here("ask", "--help").stdout.decode().replace("│", " ").split())
    assert "Only warnings and errors on stderr." in help_text
    done = here(*ASK.split(), "--kv-budget", "100000")
    assert b"warning: " in done.stderr
