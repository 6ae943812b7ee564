"""Gate folders: both formats are read, and each fault is named."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trimkv_cli.cache.gate_files import RELEASED_WEIGHTS, check_gates, read_gates, write_gates, write_released
from trimkv_cli.cache.gates import layer_shapes, tensor_key
from trimkv_cli.errors import GateMismatch, ModelNotFound, TrimkvError
from trimkv_cli.model.spec import GateVariant, ModelSpec

GOLDEN = Path(__file__).parents[1] / "golden"
KEY = "model.layers.1.self_attn.retention_gate.linear2.weight"


def base_config(**changes: object) -> dict[str, Any]:
    return {**json.loads((GOLDEN / "qwen3_base/config.json").read_text()), **changes}


def model_spec(**changes: object) -> ModelSpec:
    return ModelSpec.from_config(base_config(**changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the released gates that a test may damage."""
    return Path(shutil.copytree(GOLDEN / "qwen3_rg", tmp_path / "gates"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = torch.load(folder / RELEASED_WEIGHTS, weights_only=True)
    change(tensors)
    torch.save(tensors, folder / RELEASED_WEIGHTS)


def check(folder: Path, spec: ModelSpec | None = None) -> None:
    files = read_gates(folder)
    check_gates(spec or model_spec(), files.gate, files.tensors)


def make_tensors(variant: str) -> dict[str, Tensor]:
    input_size = 2 * 2 * 32 if variant in ("rg2", "rg3") else 64
    shapes = layer_shapes(variant=variant, input_size=input_size, hidden=32, num_kv_heads=2)
    shared = torch.randn(2, 32)
    return {
        tensor_key(layer, name): shared if name == "linear3.weight" else torch.randn(shape)
        for layer in range(3)
        for name, shape in shapes.items()
    }


class RunsCode:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, ("echo pwned > pwned.txt",)


def test_released_format() -> None:
    """Catches a float memory_size that stays a float, and a context taken from the wrong key."""
    gate, tensors, hidden_act, warnings = read_gates(GOLDEN / "qwen3_rg")
    assert (gate.id, gate.variant, gate.hidden, hidden_act) == ("qwen3_rg", "rg", 32, "silu")
    assert (gate.memory_size, type(gate.memory_size), gate.buffer_size, gate.trained_context) == (32, int, 8, 4096)
    assert (gate.base_model, gate.model_type) == ("../qwen3_base", "qwen3")
    assert len(tensors) == 12
    assert warnings == ()
    assert check_gates(model_spec(), gate, tensors, model_id="somewhere/Qwen3_Base/") == ()


def test_gates_made_for_several_budgets_say_so(tmp_path: Path) -> None:
    """Catches a range of budgets that is lost on the way to the warning about it."""
    gate, tensors, _, _ = read_gates(GOLDEN / "qwen3_rg")
    write_gates(tmp_path, replace(gate, largest_memory_size=128), tensors)
    assert read_gates(tmp_path).gate.largest_memory_size == 128


@pytest.mark.parametrize("variant", ["rg10", "rg2", "rg3"])
@pytest.mark.parametrize("write", [write_gates, write_released])
def test_what_is_written_is_read_again(tmp_path: Path, write: Callable[..., None], variant: GateVariant) -> None:
    """Catches a field or a tensor that one of the two directions forgets, and safetensors' refusal of shared memory."""
    gate = read_gates(GOLDEN / "qwen3_rg").gate
    tensors = make_tensors(variant)
    asked = dataclasses.replace(gate, id="mine", variant=variant)
    write(tmp_path / "deep/mine", asked, tensors, hidden_act="gelu")
    again = read_gates(tmp_path / "deep/mine")
    assert again.hidden_act == "gelu"
    assert again.gate == asked
    assert again.tensors.keys() == tensors.keys()
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in tensors.items())
    assert not list((tmp_path / "deep/mine").glob(".*"))
    check_gates(model_spec(), again.gate, again.tensors)


def test_own_config_names_what_a_reader_needs(tmp_path: Path) -> None:
    """Catches a renamed field in a format that others write, too."""
    gate, tensors, _, _ = read_gates(GOLDEN / "qwen3_rg")
    write_gates(tmp_path, gate, tensors)
    assert json.loads((tmp_path / "gates.json").read_text()) == {
        "format_version": 1,
        "model_type": "qwen3",
        "base_model": "../qwen3_base",
        "retention_gate": "rg",
        "retention_gate_intermediate_size": 32,
        "hidden_act": "silu",
        "memory_size": 32,
        "trained_context": 4096,
        "buffer_size": 8,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
    }


def test_an_unwritable_folder_is_explained(tmp_path: Path) -> None:
    """Catches an OSError that reaches the user as a traceback."""
    gate, tensors, _, _ = read_gates(GOLDEN / "qwen3_rg")
    (tmp_path / "file").write_text("")
    with pytest.raises(TrimkvError, match="cannot write"):
        write_gates(tmp_path / "file", gate, tensors)


def test_a_future_format_is_refused(tmp_path: Path) -> None:
    """Catches a newer file that is read as if it were ours."""
    gate, tensors, _, _ = read_gates(GOLDEN / "qwen3_rg")
    write_gates(tmp_path, gate, tensors)
    config = json.loads((tmp_path / "gates.json").read_text())
    (tmp_path / "gates.json").write_text(json.dumps({**config, "format_version": 2}))
    with pytest.raises(GateMismatch, match="format_version is 2"):
        read_gates(tmp_path)


@pytest.mark.parametrize("variant", ["rg", "rg10", "rg3"])
def test_a_config_without_variant_is_told_by_its_tensors(folder: Path, variant: str) -> None:
    """Catches older releases that stop loading, and a guess that nobody is told of."""
    if variant != "rg":
        torch.save(make_tensors(variant), folder / RELEASED_WEIGHTS)
    change_config(folder, retention_gate=..., retention_gate_intermediate_size=..., hidden_act=...)
    gate, tensors, hidden_act, warnings = read_gates(folder)
    assert (gate.variant, gate.hidden, hidden_act) == (variant, 32, "silu")
    assert [warning.code for warning in warnings] == ["gate_variant"]
    check_gates(model_spec(), gate, tensors)


@pytest.mark.parametrize(
    ("value", "expected"), [(512.0, 512), (512, 512), (None, None), (..., None)], ids=["float", "int", "null", "absent"]
)
def test_memory_size(folder: Path, value: object, expected: int | None) -> None:
    """Catches a refusal of 512.0, which released configs hold."""
    change_config(folder, memory_size=value)
    assert read_gates(folder).gate.memory_size == expected


@pytest.mark.parametrize("value", [512.5, 0, -1, "512", [512]])
def test_a_memory_size_that_is_no_number_of_slots(folder: Path, value: object) -> None:
    """Catches a budget of half a slot."""
    change_config(folder, memory_size=value)
    with pytest.raises(GateMismatch, match="memory_size"):
        read_gates(folder)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("rg99", "gate variant 'rg99' is not supported"),
        (7, "gate variant 7 is not supported"),
        ("none", "gate variant 'none' is not supported"),
    ],
)
def test_other_variants_are_refused_by_name(folder: Path, variant: object, message: str) -> None:
    """Catches a gate of another kind that is run as an rg gate."""
    change_config(folder, retention_gate=variant)
    with pytest.raises(GateMismatch, match=message):
        read_gates(folder)


def test_a_gate_of_keys_and_values_is_as_wide_as_those(folder: Path) -> None:
    """Catches an rg2 gate, whose tensors have an rg's names, that is given hidden states, and the reverse."""
    change_config(folder, retention_gate="rg2")
    with pytest.raises(GateMismatch, match=r"linear1\.weight is \[32, 64\] instead of \[32, 128\]"):
        check(folder)
    torch.save(make_tensors("rg2"), folder / RELEASED_WEIGHTS)
    check(folder)
    change_config(folder, retention_gate="rg")
    with pytest.raises(GateMismatch, match=r"linear1\.weight is \[32, 128\] instead of \[32, 64\]"):
        check(folder)


def test_a_folder_without_gates(tmp_path: Path) -> None:
    """Catches a model folder given as gates."""
    with pytest.raises(ModelNotFound, match="holds no gates") as caught:
        read_gates(GOLDEN / "qwen3_base")
    assert caught.value.exit_code == 6
    assert "trimkv_weights.pth" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["config.json"])
def test_half_a_folder_says_which_file_it_lacks(folder: Path, name: str) -> None:
    """Catches a copy that was interrupted."""
    (folder / name).unlink()
    with pytest.raises(ModelNotFound, match=f"lacks {name}"):
        read_gates(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"rg"', b'{"memory_size": NaN}'])
def test_an_unreadable_config(folder: Path, content: bytes) -> None:
    """Catches a JSON error without the file's name."""
    (folder / "config.json").write_bytes(content)
    with pytest.raises(GateMismatch, match=r"config\.json"):
        read_gates(folder)


@pytest.mark.parametrize("kept", [0, 1, 100, 5_000, 30_000])
def test_a_truncated_pickle(folder: Path, kept: int) -> None:
    """Catches a download that stopped."""
    path = folder / RELEASED_WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(GateMismatch, match=r"cannot read .*trimkv_weights\.pth"):
        read_gates(folder)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_a_pickle_that_would_run_code_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[..., object]
) -> None:
    """Catches torch.load without weights_only."""
    monkeypatch.chdir(folder)
    save({KEY: RunsCode()}, folder / RELEASED_WEIGHTS)
    with pytest.raises(GateMismatch, match="refuses to run code from") as caught:
        read_gates(folder)
    assert "system" in caught.value.message
    assert not (folder / "pwned.txt").exists()


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], 3])
def test_a_pickle_of_something_else(folder: Path, content: object) -> None:
    """Catches an AttributeError on a list."""
    torch.save(content, folder / RELEASED_WEIGHTS)
    with pytest.raises(GateMismatch, match="not named tensors"):
        read_gates(folder)


def test_a_pickle_with_more_than_tensors(folder: Path) -> None:
    """Catches an optimiser's state that is taken for gates."""
    change_tensors(folder, lambda tensors: tensors.update(step=3, extra=collections.OrderedDict()))
    with pytest.raises(GateMismatch, match="more than tensors: step, extra"):
        read_gates(folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64])
def test_unreadable_safetensors(tmp_path: Path, content: bytes) -> None:
    """Catches a SafetensorError that reaches the user."""
    gate, tensors, _, _ = read_gates(GOLDEN / "qwen3_rg")
    write_gates(tmp_path, gate, tensors)
    (tmp_path / "gates.safetensors").write_bytes(content)
    with pytest.raises(GateMismatch, match=r"cannot read .*gates\.safetensors"):
        read_gates(tmp_path)


def test_missing_extra_and_misshapen_keys_are_all_named(folder: Path) -> None:
    """Catches a check that stops at the first fault."""

    def damage(tensors: dict[str, Any]) -> None:
        del tensors["model.layers.0.self_attn.retention_gate.bias"]
        tensors[KEY] = torch.zeros(3, 32)
        tensors["model.layers.3.self_attn.retention_gate.bias"] = torch.zeros(2)

    change_tensors(folder, damage)
    with pytest.raises(GateMismatch) as caught:
        check(folder)
    message = caught.value.message
    assert "model.layers.0.self_attn.retention_gate.bias is missing" in message
    assert f"{KEY} is [3, 32] instead of [2, 32]" in message
    assert "model.layers.3.self_attn.retention_gate.bias is not expected" in message
    assert "\n" not in message
    assert caught.value.exit_code == 6


def test_only_the_first_faults_are_listed(folder: Path) -> None:
    """Catches a line with a key for each of 36 layers."""
    change_tensors(folder, dict.clear)
    with pytest.raises(GateMismatch, match=r"is missing, \+4 more$"):
        check(folder)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"hidden_size": 128}, r"linear1\.weight is \[32, 64\] instead of \[32, 128\]"),
        ({"num_key_value_heads": 4}, r"linear2\.weight is \[2, 32\] instead of \[4, 32\]"),
        ({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, r"model\.layers\.3\..* is missing"),
        ({"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, r"model\.layers\.2\..* is not expected"),
    ],
)
def test_gates_of_another_size(folder: Path, changes: dict[str, object], fault: str) -> None:
    """Catches gates of the 4B model on the 8B one."""
    with pytest.raises(GateMismatch, match=fault):
        check(folder, model_spec(**changes))


def test_gates_of_another_family(folder: Path) -> None:
    """Catches Phi-3 gates on a Qwen3 model of the same size."""
    change_config(folder, model_type="phi3")
    with pytest.raises(GateMismatch, match="gates for phi3, the model is qwen3"):
        check(folder)


def test_gates_of_another_base_are_a_warning(folder: Path) -> None:
    """Catches a refusal of gates that fit a fine-tuned sibling."""
    gate, tensors, _, _ = read_gates(folder, id="someone/gates")
    (warning,) = check_gates(model_spec(), gate, tensors, model_id="Qwen/Qwen3-4B")
    assert warning.code == "gate_base_model"
    assert warning.message == "someone/gates was trained for ../qwen3_base, not for Qwen/Qwen3-4B"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(folder: Path, value: float) -> None:
    """Catches a NaN that would make every score of a layer NaN."""
    change_tensors(folder, lambda tensors: tensors[KEY].view(-1)[3:4].fill_(value))
    with pytest.raises(GateMismatch, match=f"NaN or infinite values: {KEY}"):
        check(folder)


@pytest.mark.parametrize("tensor", [torch.zeros(2, 32, dtype=torch.int64), torch.zeros(2, 32).to_sparse()])
def test_tensors_of_another_kind(folder: Path, tensor: Tensor) -> None:
    """Catches quantised or sparse weights that would be cast without a word."""
    change_tensors(folder, lambda tensors: tensors.update({KEY: tensor}))
    with pytest.raises(GateMismatch, match=f"{KEY} is not a dense float tensor"):
        check(folder)


def test_our_own_format_wins_where_both_lie(folder: Path) -> None:
    """Catches a folder whose answer depends on the order of its files."""
    gate, tensors, _, _ = read_gates(folder)
    write_gates(folder, gate, {key: tensor + 1 for key, tensor in tensors.items()})
    again = read_gates(folder).tensors
    assert torch.equal(again[KEY], tensors[KEY] + 1)


def test_half_precision_files_keep_their_dtype(tmp_path: Path) -> None:
    """Catches a file of 210 MB that becomes 420 MB while it is read."""
    gate, tensors, _, _ = read_gates(GOLDEN / "qwen3_rg")
    write_gates(tmp_path, gate, tensors)
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, tmp_path / "gates.safetensors")
    assert {tensor.dtype for tensor in read_gates(tmp_path).tensors.values()} == {torch.bfloat16}
