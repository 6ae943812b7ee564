"""Run `trimkv` as a user does: in a process of its own."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[bytes]]
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "trimkv_cli"]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("TRIMKV_", "FORCE_COLOR", "CI"))},
    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests"))),
    "OMP_NUM_THREADS": "1",
}


def trimkv(
    *arguments: str | Path, stdin: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run to the end with piped stdin, stdout and stderr."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin.encode(),
        capture_output=True,
        env={**ENVIRONMENT, **(environment or {})},
        timeout=120,
        check=False,
    )


def trimkv_on_a_terminal(*arguments: str, environment: Mapping[str, str] | None = None) -> bytes:
    """Run with stdout and stderr on a pseudo-terminal; return what stands on it."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=side,
        stderr=side,
        env={**ENVIRONMENT, "TERM": "xterm", **(environment or {})},
    )
    os.close(side)
    shown = b""
    try:
        while piece := os.read(main, 65536):
            shown += piece
    except OSError:  # how Linux says that the other side is closed
        pass
    finally:
        os.close(main)
    assert process.wait(timeout=60) == 0
    return shown
