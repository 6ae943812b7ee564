"""A command that goes on in the background: a process of its own, its log, and what became of its start."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

from trimkv_cli.errors import UsageError
from trimkv_cli.files import replaced, writing
from trimkv_cli.ui.plain import print_note

_READY = b"ready"


@contextmanager
def detached(url: str, *, quiet: bool) -> Iterator[Callable[[], None]]:
    """Run the block in a process without a terminal; yields what that one calls when it is ready.

    This process waits until then, prints `url` and ends; where the other one fails, with its messages and exit code.

    Raises:
        UsageError: the system has no such processes.
        TrimkvError: the log cannot be written.
    """
    if os.name != "posix":
        raise UsageError("--detach needs a POSIX system", hint="start trimkv serve in a window of its own")
    log = _log_file(url)
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    heard, said = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing has started a thread so far, and nothing heavy is loaded: that comes in the process that needs it.
    pid = os.fork()
    if pid:
        os.close(said)
        os.close(output)
        raise typer.Exit(_wait(pid, heard, url, log, quiet=quiet))
    os.close(heard)
    _leave_terminal(output)
    yield lambda: _say_ready(said)


def _log_file(url: str) -> Path:
    from platformdirs import user_state_path

    return user_state_path("trimkv") / f"serve-{url.rpartition(':')[2]}.log"


def _leave_terminal(output: int) -> None:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)


def _say_ready(said: int) -> None:
    with suppress(OSError):  # nobody waits any more
        os.write(said, _READY)
    os.close(said)


def _wait(pid: int, heard: int, url: str, log: Path, *, quiet: bool) -> int:
    """Return the exit code for the process that waits."""
    try:
        ready = os.read(heard, len(_READY)) == _READY
    except BaseException:
        os.kill(pid, signal.SIGTERM)
        raise
    finally:
        os.close(heard)
    if ready:
        print(url, flush=True)
        if not quiet:
            print_note(f"runs as process {pid}, writes to {log}; trimkv stop ends it")
        return 0
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError):
        sys.stderr.write(replaced(log.read_text("utf-8", "replace")))
    return code if code >= 0 else 128 - code
