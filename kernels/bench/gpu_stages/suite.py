"""Stage 8: the tests marked gpu, in files that need no more than a bare machine has."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from bench.gpu_stages.stage import Check, Evidence, Setting, not_shown

ROOT = Path(__file__).parents[3]
FILES = (
    "tests/kernel/test_triton.py",
    "tests/kernel/test_step.py",
    "tests/engine/test_ahead.py",
    "tests/engine/test_footprint.py",
)
# Of what tests may import these are not everywhere; a rehearsal has none of them.
MISSING = ("hypothesis", "openai", "pexpect", "pyte", "httpx", "llguidance", "pypdfium2")
_WORKERS = 4  # for each file
_FLAGS = ("-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "-o", "filterwarnings=")


def tests(setting: Setting) -> Iterator[Evidence]:
    """Run the files at the same time, each in a process of its own; a rehearsal finds no test to run in them."""
    if importlib.util.find_spec("pytest") is None:
        yield not_shown("tests", "there is no pytest")
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        yield not_shown("tests of int8 and nf4", "there is no bitsandbytes")
    groups = [FILES] if setting.tiny else [(name,) for name in FILES]
    running = [(files, start(files, setting)) for files in groups]
    for files, process in running:
        code = process.wait()
        yield judge(", ".join(files), code, _report(files, setting), setting)


def start(files: Sequence[str], setting: Setting) -> subprocess.Popen[bytes]:
    """Start pytest on files, with no plugin that happens to be installed."""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment["TRITON_INTERPRET"] = "0"  # conftest.py would set it where it sees no GPU
    if setting.tiny:
        environment["PYTHONPATH"] = os.pathsep.join([str(_without(setting)), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", *files, *_FLAGS, f"--junitxml={_report(files, setting)}"]
    if setting.on_gpu and importlib.util.find_spec("xdist") is not None:  # most of the time goes to compiling
        command += ["-p", "xdist.plugin", "-n", str(_WORKERS)]
    if importlib.util.find_spec("bitsandbytes") is None:
        command += ["-k", "not int8 and not nf4"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL)


def _without(setting: Setting) -> Path:
    """Return a folder of modules that cannot be imported, as if they were not installed."""
    folder = setting.scratch / "missing"
    folder.mkdir(exist_ok=True)
    for name in MISSING:
        (folder / f"{name}.py").write_text(f'raise ModuleNotFoundError("no {name} here", name="{name}")\n')
    return folder


def _report(files: Sequence[str], setting: Setting) -> Path:
    return setting.scratch / f"{Path(files[0]).stem}.xml"


def judge(name: str, code: int, report: Path, setting: Setting) -> Evidence:
    """Say what came of a file: on a GPU all its tests must have run; elsewhere all must have been found."""
    if not report.exists():
        return Evidence(check=name, ok=False, facts={"exit_code": code, "error": "pytest wrote no report"})
    cases = list(ET.parse(report).iter("testcase"))  # noqa: S314  pytest wrote it
    ends = {kind: [case.get("name", "") for case in cases if case.find(kind) is not None] for kind in _ENDS}
    passed = len(cases) - sum(map(len, ends.values()))
    facts = {"passed": passed, "skipped": len(ends["skipped"]), "failed": [*ends["failure"], *ends["error"]][:20]}
    ran = passed > 0 and not ends["skipped"] if setting.on_gpu else bool(ends["skipped"])
    return Evidence(check=name, ok=code == 0 and ran and not facts["failed"], facts={**facts, "exit_code": code})


_ENDS = ("skipped", "failure", "error")

CHECKS: tuple[Check, ...] = (tests,)
