"""Catches layers in the wrong order, keys that are silently dropped, and a project that has code loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from trimkv_cli import settings
from trimkv_cli.app import command_tree
from trimkv_cli.commands.options import settings_of
from trimkv_cli.errors import ConfigError
from trimkv_cli.loading.options import EngineOptions, SamplingOptions

KINDS = {name: option.kind for name, option in settings_of(command_tree()).items()}


def load_settings(cwd: Path, environ: Mapping[str, str]) -> Mapping[str, Any]:
    """Return the settings of all places, whatever their values."""
    return settings.load_settings(cwd, environ, KINDS, lambda *_: None)


@pytest.fixture(autouse=True)
def user_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the user's config file, which is not there yet."""
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.setattr(platformdirs, "user_config_path", lambda _: folder)
    return folder / "config.toml"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a folder two levels below a repository's root."""
    (tmp_path / "repo" / ".git").mkdir(parents=True)
    inner = tmp_path / "repo" / "a" / "b"
    inner.mkdir(parents=True)
    return inner


def test_every_engine_and_sampling_option_can_be_set() -> None:
    names = {field.name for options in (EngineOptions, SamplingOptions) for field in fields(options)}
    assert names <= KINDS.keys()


def test_nothing_is_set_by_default(project: Path) -> None:
    assert load_settings(project, {"PATH": "/bin", "TRIMKV_DEBUG": "1", "TRIMKV_MODEL": ""}) == {}


def test_environment_goes_before_project_before_user(project: Path, user_config: Path) -> None:
    user_config.write_text('model = "user"\ndevice = "cpu"\nseed = 1\n')
    (project.parent / "trimkv.toml").write_text('model = "project"\ndevice = "cuda"\n')
    found = load_settings(project, {"TRIMKV_MODEL": "environment"})
    assert found == {"model": "environment", "device": "cuda", "seed": 1}


def test_pyproject_counts_and_trimkv_toml_goes_before_it(project: Path) -> None:
    (project / "pyproject.toml").write_text('[tool.trimkv]\nmodel = "shared"\nkv-budget = 512\n')
    assert load_settings(project, {}) == {"model": "shared", "kv_budget": "512"}
    (project / "trimkv.toml").write_text('model = "own"\n')
    assert load_settings(project, {}) == {"model": "own"}


def test_a_pyproject_without_our_table_is_passed_over(project: Path) -> None:
    (project / "pyproject.toml").write_text("[project]\n")
    (project.parent.parent / "trimkv.toml").write_text("seed = 3\n")
    assert load_settings(project, {}) == {"seed": 3}


def test_nothing_above_the_repository_counts(project: Path) -> None:
    (project.parents[2] / "trimkv.toml").write_text("seed = 3\n")
    assert load_settings(project, {}) == {}


def test_outside_a_repository_only_the_folder_itself_counts(tmp_path: Path) -> None:
    folder = tmp_path / "plain" / "inner"
    folder.mkdir(parents=True)
    (folder.parent / "trimkv.toml").write_text("seed = 3\n")
    assert load_settings(folder, {}) == {}


@pytest.mark.parametrize("name", ["trimkv.toml", "pyproject.toml"])
def test_a_project_may_not_have_code_loaded(name: str, project: Path) -> None:
    table = "[tool.trimkv]\n" if name == "pyproject.toml" else ""
    (project / name).write_text(f"{table}trust_remote_code = true\n")
    with pytest.raises(ConfigError, match="trust_remote_code is not allowed"):
        load_settings(project, {})


def test_a_project_may_not_have_code_loaded_under_another_spelling(project: Path) -> None:
    (project / "trimkv.toml").write_text("trust-remote-code = true\n")
    with pytest.raises(ConfigError, match="not allowed"):
        load_settings(project, {})


def test_a_user_may_have_code_loaded(project: Path, user_config: Path) -> None:
    user_config.write_text("trust_remote_code = true\n")
    assert load_settings(project, {}) == {"trust_remote_code": True}


def test_an_unknown_key_is_named_with_its_file(project: Path) -> None:
    (project / "trimkv.toml").write_text('bugdet = "8GiB"\n')
    with pytest.raises(ConfigError, match="unknown key 'bugdet'") as caught:
        load_settings(project, {})
    assert "trimkv.toml" in caught.value.message
    assert caught.value.hint == "did you mean budget?"


def test_a_misspelt_variable_is_named_and_a_foreign_one_left_alone(project: Path) -> None:
    with pytest.raises(ConfigError, match="TRIMKV_BUDGTE") as caught:
        load_settings(project, {"TRIMKV_BUDGTE": "8GiB"})
    assert caught.value.hint == "did you mean TRIMKV_BUDGET?"
    assert load_settings(project, {"TRIMKV_WEBHOOK": "x"}) == {}


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [("SEED", "7", 7), ("TOP_P", "0.5", 0.5), ("OFFLINE", "yes", True), ("LIVE", "0", False), ("STOP", "END", ["END"])],
)
def test_variables_are_read_by_type(variable: str, text: str, value: object, project: Path) -> None:
    assert load_settings(project, {f"TRIMKV_{variable}": text}) == {variable.lower(): value}


@pytest.mark.parametrize(("variable", "text"), [("SEED", "x"), ("TOP_P", "x"), ("OFFLINE", "maybe")])
def test_a_variable_of_another_type_is_named(variable: str, text: str, project: Path) -> None:
    with pytest.raises(ConfigError, match=f"TRIMKV_{variable}={text}"):
        load_settings(project, {f"TRIMKV_{variable}": text})


@pytest.mark.parametrize(
    "content", ['seed = "x"', "seed = true", "seed = ", "offline = 1", 'stop = "END"', "budget = 1.5"]
)
def test_a_value_of_another_type_is_named(content: str, project: Path) -> None:
    (project / "trimkv.toml").write_text(content)
    with pytest.raises(ConfigError, match=r"trimkv\.toml"):
        load_settings(project, {})
