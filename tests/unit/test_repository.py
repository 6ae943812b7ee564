"""The shape of the repository: names that must stay free, and rules that must stay written down."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli

from trimkv_cli.tested import NEWEST, OLDEST_TRANSFORMERS

ROOT = Path(__file__).parents[2]
PYPROJECT = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRACTS = {
    "the fast path of a CPU has one door",
    "the fast path of a GPU has one door",
    "one staircase down",
    "what goes in, what comes out and what it costs is plain Python",
    "jobs, conversations and the endpoint know no display and nothing heavy",
    "only the endpoint speaks HTTP to its clients",
    "commands load nothing heavy themselves, and only ui knows the terminal",
    "triton stays in the kernels, which know nothing of the program",
}


def test_kernels_folder_is_no_package() -> None:
    """Catch an `__init__.py` that makes transformers take our folder for PyPI's `kernels`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", ["kernels", "triton"])
def test_no_test_folder_shadows_a_package(name: str) -> None:
    """Catch a test folder that becomes importable under the name of a package we need."""
    assert not (ROOT / "tests" / name).exists()


def test_tests_are_no_package() -> None:
    """Catch an `__init__.py` in tests, which would change how pytest names and imports them."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_import_direction_is_enforced() -> None:
    """Catch a contract that was dropped to make an import pass."""
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    assert {contract["name"] for contract in contracts} == CONTRACTS


def test_constraints_pin_every_dependency() -> None:
    """Catch a dependency without a tested version, and a pin that fits one build of torch only."""
    pins = _pins()
    project = PYPROJECT["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    names = {_name(line) for line in [*project["dependencies"], *extras]}
    assert names - {"trimkv-cli"} <= pins.keys()
    assert not [version for version in pins.values() if "+" in version]


def test_newest_tested_versions_are_those_of_the_constraints() -> None:
    """Catch a `doctor` that calls a release untested which CI runs, or the other way round."""
    pins = _pins()
    assert {_name(name): version for name, version in NEWEST.items()}.items() <= pins.items()
    run_time = {_name(line) for line in PYPROJECT["project"]["dependencies"]}
    assert {_name(name) for name in NEWEST} - {"triton"} == run_time
    assert f"transformers>={'.'.join(OLDEST_TRANSFORMERS.split('.')[:2])},<6" in PYPROJECT["project"]["dependencies"]


def test_version_is_in_one_place() -> None:
    """Catch a version written in pyproject.toml beside the one in the package."""
    assert "version" not in PYPROJECT["project"]
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "trimkv_cli/__init__.py"


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {_name(name): version for name, version in pairs}


def _name(requirement: str) -> str:
    for end in "[<>=!;~ ":
        requirement = requirement.partition(end)[0]
    return requirement.lower().replace("_", "-")
