"""A process that writes lines of JSON, and how much memory was resident in it at most."""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

_SAMPLED_S = 0.05
RESIDENT = {"peak": "VmHWM", "anon": "RssAnon", "file": "RssFile"}


@dataclass(slots=True, kw_only=True)
class Watched:
    """A process, and its peaks: the kernel's own, and the largest of its two kinds that were seen."""

    process: subprocess.Popen[str]
    peaks: dict[str, int] = field(default_factory=dict)

    @classmethod
    def start(cls, module: str, *arguments: str, asked: bool = False) -> Self:
        """Run a module in a process of its own; one that is not to be asked has no stdin."""
        command = [sys.executable, "-m", module, *arguments]
        stdin = subprocess.PIPE if asked else subprocess.DEVNULL
        return cls(process=subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, text=True, bufsize=1))

    def forget_peaks(self) -> None:
        """Begin new peaks."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5", encoding="ascii")
        self.peaks = {}

    def ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Send one line and wait for the answer."""
        assert self.process.stdin is not None, "it was started to be asked"
        self.forget_peaks()
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return self.next_line()

    def next_line(self) -> dict[str, Any]:
        """Wait for the next object and return it, empty at the end, with an eye on the memory.

        Raises:
            CalledProcessError: the process failed.
        """
        stdout = self.process.stdout
        assert stdout is not None, "it is a pipe"
        while True:
            self._look()
            if not select.select([stdout], [], [], _SAMPLED_S)[0]:
                continue
            line = stdout.readline()
            self._look()
            if not line and (code := self.process.wait()):
                raise subprocess.CalledProcessError(code, self.process.args)
            if not line:
                return {}
            if line.startswith("{"):
                said: dict[str, Any] = json.loads(line)
                return said

    def end(self) -> None:
        """Wait for its end; raises as `next_line` does."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        while self.next_line():
            pass

    def _look(self) -> None:
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        except OSError:
            return
        for name, key in RESIDENT.items():
            if found := re.search(rf"{key}:\s*(\d+) kB", status):
                self.peaks[name] = max(self.peaks.get(name, 0), int(found[1]) * 1024)


def resident_bytes() -> int:
    """Return what is resident in this process now."""
    found = re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None, "the kernel says so"
    return int(found[1]) * 1024
