"""Mistakes in what lines may call the model that runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import find_here, model_names
from trimkv_cli.mini import GATES_FOLDER, MODEL_FOLDER
from trimkv_cli.model.profiles import load_profile


def names(**options: str) -> frozenset[str]:
    chosen = EngineOptions(**options)  # type: ignore[arg-type]
    return model_names(chosen, find_here(chosen))


@pytest.mark.parametrize("options", [{"model": "qwen3-4b-math"}, {"profile": "qwen3-4b-math"}])
def test_a_profile_s_model_goes_by_the_profile_s_name_and_by_its_own(options: dict[str, str]) -> None:
    """Catches the hub id refused by --validate --strict, and answered by the run."""
    profile = load_profile("qwen3-4b-math")
    assert {profile.name, profile.model, profile.gates} <= names(**options)


def test_a_hub_id_goes_by_the_profile_with_its_gates() -> None:
    profile = load_profile("qwen3-4b-math")
    found = names(model=profile.model)
    assert profile.model in found
    assert "mini" not in found


def test_without_a_model_only_mini_runs() -> None:
    """Catches every name accepted where the run accepts one."""
    assert "mini" in names()
    assert "gpt-4" not in names()


def test_a_folder_goes_by_its_path_its_name_and_what_its_gates_are_for(tmp_path: Path) -> None:
    shutil.copytree(MODEL_FOLDER, tmp_path / "some-model", ignore=shutil.ignore_patterns("*.safetensors"))
    gates = tmp_path / "some-model" / "gates"
    shutil.copytree(GATES_FOLDER, gates, dirs_exist_ok=True)
    config = json.loads((gates / "gates.json").read_text())
    (gates / "gates.json").write_text(json.dumps({**config, "base_model": "someone/some-base"}))
    path = str(tmp_path / "some-model")
    assert {path, "some-model", "someone/some-base"} <= names(model=path)
    assert {path, "some-model"} <= names(model=path, gates="streaming")


def test_a_model_that_is_not_here_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check of lines that waits for a download."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setitem(sys.modules, "httpx", None)
    assert find_here(EngineOptions(model="nobody/nothing")) is None
    assert "nobody/nothing" in names(model="nobody/nothing")
