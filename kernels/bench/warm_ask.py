"""What one `trimkv ask` costs with a warm server and without: CPU seconds of its process, time to the first letter.

python -m bench.warm_ask [--runs 10] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bench.record import write_record

_QUESTION = "My cat is called Zubo. What is my cat called?"
_COMMANDS: Mapping[str, list[str]] = {
    "--version": ["--version"],
    "ask, warm": ["ask", _QUESTION, "--greedy"],
    "ask, warm, --json": ["ask", _QUESTION, "--greedy", "--json"],
    "ask, --server off": ["ask", _QUESTION, "--greedy", "--server", "off"],
}
_COLD_RUNS = 3


def main() -> None:
    """Start a server of mini, run every command in turns, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    cpu_s: dict[str, list[float]] = {name: [] for name in _COMMANDS}
    first_s: dict[str, list[float]] = {name: [] for name in _COMMANDS}
    with _server() as environment:
        for run in range(given.runs + 1):
            for name, arguments in _COMMANDS.items():
                if name.endswith("off") and run > _COLD_RUNS:
                    continue
                spent, waited = _measure(arguments, environment)
                if run:  # the first one writes Python's compiled files
                    cpu_s[name].append(spent)
                    first_s[name].append(waited)
    measured = {
        "runs": given.runs,
        "median_cpu_s": {name: round(statistics.median(each), 3) for name, each in cpu_s.items()},
        "median_first_letter_s": {name: round(statistics.median(each), 3) for name, each in first_s.items()},
        "least_first_letter_s": {name: round(min(each), 3) for name, each in first_s.items()},
    }
    write_record("bench.warm_ask", measured, given.out)


@contextmanager
def _server() -> Iterator[dict[str, str]]:
    """Start a server that nobody else finds; yields the environment in which it is found."""
    with tempfile.TemporaryDirectory() as folder:
        places = {
            f"XDG_{name}_{kind}": folder for name, kind in (("RUNTIME", "DIR"), ("STATE", "HOME"), ("DATA", "HOME"))
        }
        environment = {**os.environ, **places}
        _trimkv(["serve", "--detach", "--port", "0", "--threads", "1"], environment)
        try:
            yield environment
        finally:
            _trimkv(["stop"], environment)


def _trimkv(arguments: list[str], environment: Mapping[str, str]) -> None:
    subprocess.run([sys.executable, "-m", "trimkv_cli", *arguments], env=environment, capture_output=True, check=True)


def _measure(arguments: list[str], environment: Mapping[str, str]) -> tuple[float, float]:
    """Return the user's and the system's time of one process, and when its first letter came, in seconds."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "trimkv_cli", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    waited = time.perf_counter() - began
    process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime, waited


if __name__ == "__main__":
    main()
