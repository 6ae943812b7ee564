"""`trimkv serve` in a process of its own, to be measured from outside."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server, by its address and its process."""

    url: str
    process: subprocess.Popen[bytes]

    def metrics(self) -> dict[str, float]:
        """Read the metrics, by name."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        rows = (line.removeprefix("trimkv_").split() for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in rows}

    def resident(self, kind: str = "VmHWM") -> int:
        """Return bytes of memory as the kernel counts them: the peak, or another line of its status."""
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        found = re.search(rf"^{kind}:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None, kind
        return int(found[1]) * 1024


@contextmanager
def served(arguments: Sequence[str]) -> Iterator[Served]:
    """Start a server on a free port, and end it as a user does.

    Raises:
        RuntimeError: it did not start, or its exit code was not 0.
    """
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "trimkv_cli", "serve", *arguments, "--port", "0"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=errors)
        try:
            yield Served(url=_address(process, errors), process=process)
            process.send_signal(signal.SIGTERM)
            if process.wait(60):
                raise RuntimeError(f"exit code {process.returncode}: {_said(errors)}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen[bytes], errors: Any) -> str:
    while (found := re.search(r"answers at (http://[^ ]*)/v1", _said(errors))) is None:
        if process.poll() is not None:
            raise RuntimeError(f"exit code {process.returncode}: {_said(errors)}")
        time.sleep(0.05)
    return found[1]


def _said(errors: Any) -> str:
    errors.seek(0)
    return str(errors.read())


def pieces(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield the chunks of a stream as they come."""
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))
