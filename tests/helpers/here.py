"""`trimkv` in the process of the tests, which have torch and transformers already: a tenth of what a new one takes."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from helpers.programs import Run
from trimkv_cli.app import _exit_code


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Return `trimkv` of helpers.programs for tests to which a process of its own makes no difference."""
    for name in ("CI", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def invoke(
        *arguments: str | Path, stdin: str = "", environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8"))
            for name, value in (environment or {}).items():
                patch.setenv(name, value)
            capfdbinary.readouterr()
            words = [str(argument) for argument in arguments]
            code = _exit_code(words)
            sys.stdout.flush()
            shown = capfdbinary.readouterr()
        return subprocess.CompletedProcess(words, code, shown.out, shown.err)

    return invoke
