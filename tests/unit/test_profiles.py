"""Catches a profile that plans with wrong numbers, and a misspelt key that is silently dropped."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from trimkv_cli.errors import ConfigError, ModelNotFound
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import find_source
from trimkv_cli.mini import GATES_FOLDER
from trimkv_cli.model import profiles
from trimkv_cli.model.folders import read_gate_spec
from trimkv_cli.model.profiles import find_profile, list_profiles, load_profile, read_profile
from trimkv_cli.model.spec import OTHERS_VARIANTS, ModelSpec

RELEASED = [profile for profile in list_profiles() if profile.config]


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the user's own profile folder."""
    built_in = profiles.profile_folders()[1]
    monkeypatch.setattr(profiles, "profile_folders", lambda: (tmp_path, built_in))
    return tmp_path


def test_every_released_gate_repository_has_a_profile() -> None:
    names = {f"TrimKV-Qwen3-{size}-Math" for size in ("1.7B", "4B", "8B", "14B")}
    names |= {"TrimKV-Qwen3-4B-Instruct-2507", "TrimKV-Phi-3-mini-128k-instruct"}
    names |= {"DBTrimKV-Qwen3-4B-Math", "DBTrimKV-Qwen3-4B-Instruct-2507"}
    ours = {profile.gates for profile in RELEASED if profile.gates and profile.variant not in OTHERS_VARIANTS}
    assert {gates for gates in ours if not gates.startswith("builtin:")} == {f"ngocbh/{name}" for name in names}


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "smollm2-135m-instruct-bf16"])
def test_gates_that_come_along_are_what_profiles_say(name: str) -> None:
    """Catches gates replaced by others while a profile plans for the old ones, and files that outgrow the package."""
    profile = load_profile(name)
    folder = profiles.built_in_gates("smollm2-135m-instruct")
    assert folder is not None
    assert profile.gate is not None
    assert profile.spec is not None
    found = read_gate_spec(folder, id="smollm2-135m-instruct")
    said = replace(profile.gate, id=found.id, base_model=found.base_model)
    assert replace(found, largest_memory_size=None) == said
    assert profiles.profile_for(found.base_model or "") == load_profile("smollm2-135m-instruct-bf16")
    size = (folder / "gates.safetensors").stat().st_size
    assert 0 < size - 2 * found.numel(profile.spec) < 20_000


@pytest.mark.parametrize("name", [str(GATES_FOLDER), "..", "../gates", "some/gates", "", "no-such"])
def test_only_plain_names_come_along(name: str) -> None:
    """Catches a folder of the user's that is taken for gates of ours, as an absolute path joined to ours is itself."""
    assert profiles.built_in_gates(name) is None


def test_gates_of_others_have_profiles_and_are_taken_by_name_alone() -> None:
    """Catches gates of a licence that nobody read, fetched because a model is named for which there are some."""
    others = {profile.gates for profile in RELEASED if profile.variant in OTHERS_VARIANTS}
    zap = {f"nvidia/KVzap-mlp-{base}" for base in ("Qwen3-8B", "Qwen3-32B", "Llama-3.1-8B-Instruct")}
    assert others == zap | {f"Jang-Hyun/Fast-KVzip:{base}" for base in ("gemma-3-12b-it", "qwen3-4b-instruct-2507")}
    assert profiles.profile_for("Qwen/Qwen3-32B") is None
    assert load_profile("qwen3-4b-instruct-2507").gates == "ngocbh/TrimKV-Qwen3-4B-Instruct-2507"


def test_published_sizes_of_others_gates() -> None:
    """Catches a wrong width: the paper gives 76 and 210 million parameters of KVzap's MLPs."""
    found = {}
    for name in ("qwen3-8b-kvzap", "qwen3-32b-kvzap"):
        profile = load_profile(name)
        assert profile.spec is not None
        assert profile.gate is not None
        found[name] = round(profile.gate.numel(profile.spec) / 1e6)
    assert found == {"qwen3-8b-kvzap": 76, "qwen3-32b-kvzap": 210}


@pytest.mark.parametrize("profile", RELEASED, ids=lambda profile: profile.name)
def test_weight_bytes_are_those_of_the_config(profile: profiles.Profile) -> None:
    assert profile.weight_bytes == ModelSpec.from_config(profile.config).weight_bytes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen3-4b-math", 4_022_468_096),
        ("qwen3-8b-math", 8_190_735_360),
        ("qwen3-14b-math", 14_768_307_200),
        ("phi-3-mini-128k-instruct", 3_821_079_552),
        ("qwen3-32b-kvzap", 32_762_123_264),
        ("llama-3.1-8b-instruct-kvzap", 8_030_261_248),
        ("gemma-3-12b-it-fastkvzip", 12_187_325_040 - 416_866_032 - 1152 * 3840 - 1152),  # SigLIP and what projects it
    ],
)
def test_parameters_are_the_published_ones(name: str, parameters: int) -> None:
    spec = load_profile(name).spec
    assert spec is not None
    assert spec.weight_numel == parameters


def test_the_one_known_revision_is_pinned() -> None:
    assert load_profile("qwen3-4b-instruct-2507").gates_revision == "89112809f83d05c3058eadcab4104abde5721b81"


def test_long_rope_is_in_the_phi_profile() -> None:
    spec = load_profile("phi-3-mini-128k-instruct").spec
    assert spec is not None
    assert (spec.original_max_positions, spec.max_positions) == (4096, 131_072)


def test_the_mini_profile_says_what_its_files_say() -> None:
    gate, files = load_profile("mini").gate, read_gate_spec(GATES_FOLDER, id="mini")
    assert gate is not None
    assert (gate.variant, gate.hidden, gate.memory_size) == (files.variant, files.hidden, files.memory_size)


def test_a_users_profile_hides_a_built_in_one(user_folder: Path) -> None:
    (user_folder / "mini.toml").write_text('model = "own/model"\n')
    assert load_profile("mini").model == "own/model"
    assert [profile.model for profile in list_profiles() if profile.name == "mini"] == ["own/model"]


def test_a_hub_model_has_the_gates_that_rank_per_head() -> None:
    found = profiles.profile_for("Qwen/Qwen3-4B")
    assert found is not None
    assert found.name == "qwen3-4b-math"
    assert profiles.profile_for("Qwen/Qwen3-0.6B") is None


def test_an_unknown_profile_suggests_a_near_one() -> None:
    assert find_profile("qwen3-4b-maths") is None
    with pytest.raises(ModelNotFound) as caught:
        load_profile("qwen3-4b-maths")
    assert caught.value.hint == "did you mean qwen3-4b-math?"


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ('model = "m"\nkv_bugdet = 3\n', "unknown key 'kv_bugdet'", "kv_budget"),
        ('model = "m"\n[sampling]\ntemprature = 1.0\n', "unknown key 'temprature' in [sampling]", "temperature"),
        ('model = "m"\ntrust_remote_code = true\n', "unknown key 'trust_remote_code'", ""),
        ('model = "m"\nkv_budget = "many"\n', "not a whole number", ""),
        ('model = "m"\nkv_budget = true\n', "not a whole number", ""),
        ('model = "m"\nkv_budget = 0\n', "too small", "1 or more"),
        ('model = "m"\nvariant = "rg4"\n', "'rg4'", "rg10"),
        ("", "'model' is missing", "model ="),
        ("model = \n", "not valid TOML", ""),
    ],
)
def test_a_faulty_profile_is_named(content: str, message: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_profile(path)
    assert str(path) in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_profile_s_file_is_known_by_its_bytes(user_folder: Path, tmp_path: Path) -> None:
    """Catches gates that a file lacks where it lies elsewhere, and those taken for a model trained on from it."""
    theirs, copy = tmp_path / "same.gguf", tmp_path / "trained-on.gguf"
    theirs.write_bytes(b"GGUF of some bytes")
    copy.write_bytes(b"GGUF of more bytes")
    ours = (profiles.profile_folders()[1] / "smollm2-135m-instruct.toml").read_text(encoding="utf-8")
    wheel = load_profile("smollm2-135m-instruct").wheel
    assert wheel is not None
    digest = hashlib.sha256(theirs.read_bytes()).hexdigest()
    mine = ours.replace(wheel.sha256, digest).replace(f"bytes = {wheel.bytes}", f"bytes = {theirs.stat().st_size}")
    (user_folder / "mine.toml").write_text(mine, encoding="utf-8")
    source = find_source(EngineOptions(model=str(theirs)), weights=False)
    assert source.profile == load_profile("mine")
    assert (source.gate.id, source.warnings) == ("smollm2-135m-instruct", ())
    assert source.notes == (
        f"{theirs} is the file of mine, byte for byte: that profile applies, with gates smollm2-135m-instruct",
    )
    assert profiles.profile_of_file(copy) is None


def test_gates_that_may_be_a_model_s_own_are_named_and_not_taken(tmp_path: Path) -> None:
    """Catches gates taken because sizes fit, and a user who is not told that there are some."""
    config = dict(load_profile("smollm2-135m-instruct-bf16").config)
    folders = {"like": config, "unlike": config | {"vocab_size": 49153}}
    said = {}
    for name, written in folders.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(written), encoding="utf-8")
        source = find_source(EngineOptions(model=str(tmp_path / name)), weights=False)
        assert source.gate.variant == "streaming"
        (said[name],) = [warning.message for warning in source.warnings]
    hint = "; if this is HuggingFaceTB/SmolLM2-135M-Instruct, --gates smollm2-135m-instruct are its own"
    assert said["like"].endswith(hint)
    assert "--gates smollm2" not in said["unlike"]
