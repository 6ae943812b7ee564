"""What an installation offers: the command, the module, and files that lie beside the code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import tomli

import trimkv_cli
from trimkv_cli.mini import GATES_FOLDER, MODEL_FOLDER

ROOT = Path(__file__).parents[2]
PYPROJECT = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_module_runs_like_the_command(tmp_path: Path) -> None:
    """Catch a `python -m trimkv_cli` that only works inside the checkout."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "trimkv_cli", "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"trimkv {trimkv_cli.__version__}\n", "")


def test_command_is_main() -> None:
    """Catch an entry point that bypasses `main`, and with it every exit code."""
    assert PYPROJECT["project"]["scripts"] == {"trimkv": "trimkv_cli.app:main"}


def test_wheel_takes_everything_that_is_read_at_run_time() -> None:
    """Catch a wheel without kernels, profiles or the sample text: they lie outside of trimkv_cli in a checkout."""
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["only-include"]) == {"trimkv_cli", "kernels/trimkv_kernels", "profiles", "examples/prose"}
    assert wheel["sources"] == {
        "kernels/trimkv_kernels": "trimkv_kernels",
        "profiles": "trimkv_cli/_profiles",
        "examples/prose": "trimkv_cli/_prose",
    }


def test_model_lies_inside_the_package() -> None:
    """Catch a built-in model that is found in a checkout only."""
    package = Path(trimkv_cli.__file__).parent
    assert package in MODEL_FOLDER.parents
    assert (MODEL_FOLDER / "config.json").is_file()
    assert (GATES_FOLDER / "gates.json").is_file()
    assert (package / "py.typed").is_file()
