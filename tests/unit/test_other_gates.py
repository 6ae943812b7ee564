"""Gates that others made: their folders are read, their scores are what plain loops say, and misfits are named."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.live_bytes import LiveBytes
from helpers.other_gates import Layers, fastkvzip_score, kvzap_score, write_fastkvzip, write_kvzap
from trimkv_cli.cache.gate_files import check_gates, gate_facts, read_gates
from trimkv_cli.cache.gates import build_gates
from trimkv_cli.cache.other_gates import NewestGate
from trimkv_cli.engine.devices import module_bytes
from trimkv_cli.errors import GateMismatch, ModelNotFound, TrimkvError
from trimkv_cli.model.folders import read_gate_spec
from trimkv_cli.model.other_gates import check_fit, fastkvzip_name
from trimkv_cli.model.spec import DTYPE_BYTES, Dtype, ModelSpec, gate_bytes, scored_layers
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.plan.plan import make_plan
from trimkv_cli.plan.step import _inputs_bytes, _others_gate_bytes

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Score = Callable[[dict[str, torch.Tensor], torch.Tensor], list[list[float]]]


def tiny(**changes: Any) -> ModelSpec:
    """Describe a model of 3 layers, 6 heads and 2 KV heads: three queries for each of those."""
    config = {
        "model_type": "qwen3",
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
    }
    return ModelSpec.from_config({**config, **changes})


def write(kind: str, folder: Path, spec: ModelSpec) -> tuple[Layers, Score]:
    if kind == "fastkvzip":
        return write_fastkvzip(folder, spec), fastkvzip_score
    return write_kvzap(folder, spec, hidden=24 if kind == "mlp" else None), kvzap_score


KINDS = ["mlp", "linear", "fastkvzip"]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_plain_loops(kind: str, tmp_path: Path) -> None:
    """Catches heads and groups in another order, a wrong norm, scale or activation, and a mean over the wrong axis."""
    spec = tiny()
    layers, score = write(kind, tmp_path / "tiny", spec)
    gate, tensors, _, _ = read_gates(tmp_path / "tiny")
    assert check_gates(spec, gate, tensors) == ()
    assert (gate.static, gate.trained) == (True, True)
    gates = build_gates(gate, spec, tensors, dtype=torch.float32, device="cpu")
    hidden = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(5))
    for module, layer in zip(gates, layers, strict=True):
        found = module(hidden, torch.arange(5).expand(2, 5))
        assert (found.shape, found.dtype) == ((2, 5, 2), torch.float32)
        expected = torch.tensor([score(layer, states) for states in hidden])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_number_is_worth_least(kind: str, tmp_path: Path) -> None:
    """Catches a token that a model's NaN makes an empty slot, and one that an overflow pins."""
    spec = tiny()
    write(kind, tmp_path / "tiny", spec)
    gate, tensors, _, _ = read_gates(tmp_path / "tiny")
    for module in build_gates(gate, spec, tensors, dtype=torch.float32, device="cpu"):
        hidden = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, 1.0]).repeat(48, 1).T[None]
        scores = module(hidden, torch.arange(5)[None])
        assert scores.isfinite().all()
        assert (scores[0, 0] == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_the_bytes(kind: str, tmp_path: Path) -> None:
    """Catches parameters that the plan forgets, and a dtype in which they are not kept."""
    spec = tiny()
    write(kind, tmp_path, spec)
    gate, tensors, _, _ = read_gates(tmp_path)
    assert gate.numel(spec) == sum(tensor.numel() for tensor in tensors.values())
    for name, dtype in TORCH_DTYPES.items():
        gates = build_gates(gate, spec, tensors, dtype=dtype, device="cpu")
        assert module_bytes(gates) == gate_bytes(spec, gate, name)  # type: ignore[arg-type]


def test_16_bits_leave_the_scores_apart(tmp_path: Path) -> None:
    """Catches scores in the compute dtype, of which many are the same number."""
    spec = tiny()
    write_kvzap(tmp_path, spec, hidden=None)
    gate, tensors, _, _ = read_gates(tmp_path)
    module = build_gates(gate, spec, tensors, dtype=torch.bfloat16, device="cpu")[0]
    scores = module(torch.randn(1, 500, 48, dtype=torch.bfloat16), torch.arange(500)[None])
    assert len(scores[..., 0].unique()) == 500


@pytest.mark.parametrize("of_all", [False, True], ids=["one per scored layer", "one per layer"])
def test_windows_keep_their_newest(of_all: bool, tmp_path: Path) -> None:
    """Catches Gemma's gates in the wrong layers: the authors score the layers without a window, in their order."""
    spec = tiny(model_type="gemma3_text", sliding_window=11, num_hidden_layers=7)
    assert scored_layers(spec) == (5,)
    layers = write_fastkvzip(tmp_path / "tiny", spec, count=spec.num_layers if of_all else 1)
    gate, tensors, _, _ = read_gates(tmp_path / "tiny")
    check_gates(spec, gate, tensors)
    gates = build_gates(gate, spec, tensors, dtype=torch.float32, device="cpu")
    hidden = torch.randn(1, 3, 48)
    expected = torch.tensor([fastkvzip_score(layers[5 if of_all else 0], hidden[0])])
    torch.testing.assert_close(gates[5](hidden, torch.arange(3)[None]), expected, rtol=1e-4, atol=1e-5)
    assert [isinstance(module, NewestGate) for module in gates] == [layer != 5 for layer in range(7)]
    assert gates[0](hidden, torch.tensor([[7, 8, 9]]))[0, :, 1].tolist() == [7, 8, 9]
    assert module_bytes(gates) == gate_bytes(spec, gate, "fp32")


def test_what_folders_say_without_their_tensors(tmp_path: Path) -> None:
    """Catches a base model, a shape or a form that a plan does not know."""
    spec = tiny()
    write_kvzap(tmp_path / "KVzap-linear-Tiny-3B", spec, hidden=None)
    write_fastkvzip(tmp_path / "tiny-3b", spec)
    zap = read_gate_spec(tmp_path / "KVzap-linear-Tiny-3B", id="nvidia/KVzap-linear-Tiny-3B")
    assert (zap.variant, zap.hidden, zap.base_model) == ("kvzap", 0, "Tiny-3B")
    place = tmp_path / "tiny-3b/q3_dim16_sink16.pt"
    for gates in (tmp_path / "tiny-3b", place):
        fast = read_gate_spec(gates, id=str(gates))
        assert (fast.variant, fast.base_model, read_gates(gates).gate.shape) == ("fastkvzip", "tiny-3b", fast.shape)
    check_fit(zap, spec, model_id="some/Tiny-3B-GGUF:Q4_K_M")
    assert fastkvzip_name("some/Tiny-3B-GGUF:Q4_K_M") == fastkvzip_name("/models/Tiny-3B/") == "tiny-3b"
    facts = gate_facts(place, id="tiny")
    assert (facts.hidden_size, facts.num_kv_heads, len(facts.layers), facts.file) == (48, 2, 3, place)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("mlp", {"num_hidden_layers": 2}, ["3 layers instead of 2"]),
        ("mlp", {"num_key_value_heads": 3}, ["2 KV heads instead of 3"]),
        ("linear", {"hidden_size": 64}, ["hidden size 48 instead of 64"]),
        ("fastkvzip", {"num_attention_heads": 8}, ["3 query heads per KV head instead of 4"]),
        ("fastkvzip", {"num_hidden_layers": 4}, ["3.q_proj.weight is missing"]),
        ("fastkvzip", {"hidden_size": 64}, ["0.q_proj.weight is [96, 48] instead of [96, 64]"]),
    ],
)
def test_gates_of_another_shape(kind: str, changes: dict[str, int], words: list[str], tmp_path: Path) -> None:
    """Catches gates that are loaded into a model of other sizes, or a refusal that does not say which."""
    write(kind, tmp_path / "tiny", tiny())
    gate, tensors, _, _ = read_gates(tmp_path / "tiny")
    with pytest.raises(GateMismatch) as caught:
        check_gates(tiny(**changes), gate, tensors)
    assert all(word in caught.value.message for word in words), caught.value.message
    assert caught.value.hint


def test_gates_of_another_base(tmp_path: Path) -> None:
    """Catches gates of one model of a shape that are taken for another's."""
    write_kvzap(tmp_path / "KVzap-mlp-Tiny-3B", tiny())
    gate, tensors, _, _ = read_gates(tmp_path / "KVzap-mlp-Tiny-3B")
    with pytest.raises(GateMismatch, match="was made for Tiny-3B, not for some/Other-3B"):
        check_gates(tiny(), gate, tensors, model_id="some/Other-3B")
    assert check_gates(tiny(), gate, tensors, model_id="some/Tiny-3B-FP8") == ()
    assert [notice.code for notice in check_gates(tiny(), gate, tensors, model_id="/here/mine")] == ["gate_base_model"]
    assert check_gates(tiny(), replace(gate, base_model=None), tensors, model_id="some/Other-3B") == ()


def read_and_check(folder: Path) -> None:
    gate, tensors, _, _ = read_gates(folder)
    check_gates(tiny(), gate, tensors)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class RunsCode:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, ("echo pwned > pwned.txt",)


def drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.1.2.bias"]
    save_file(tensors, folder / "model.safetensors")


FAST = "q3_dim16_sink16.pt"
DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "cut safetensors": ("mlp", lambda folder: cut(folder / "model.safetensors"), "cannot read"),
    "no safetensors": ("mlp", lambda folder: (folder / "model.safetensors").unlink(), "lacks model.safetensors"),
    "a tensor is missing": ("mlp", drop_a_tensor, "layers.1.2.bias is missing"),
    "cut pickle": ("fastkvzip", lambda folder: cut(folder / FAST), "cannot read"),
    "code": ("fastkvzip", lambda folder: torch.save({"module": [RunsCode()]}, folder / FAST), "run code"),
    "no list": ("fastkvzip", lambda folder: torch.save({"module": 3}, folder / FAST), "no list of gates"),
    "no tensors": ("fastkvzip", lambda folder: torch.save({"module": [{"b": 3}]}, folder / FAST), "more than tensors"),
    "not a dict": ("fastkvzip", lambda folder: torch.save([1], folder / FAST), "holds a list"),
    "two files": ("fastkvzip", lambda folder: (folder / "q4_dim16_sink16.pt").touch(), "several gates"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, gates that are half read, and a pickle that runs what it holds."""
    monkeypatch.chdir(tmp_path)
    kind, damage, words = DAMAGE[name]
    folder = tmp_path / "tiny"
    write(kind, folder, tiny())
    damage(folder)
    with pytest.raises(TrimkvError, match=words) as caught:
        read_and_check(folder)
    assert (caught.value.exit_code, bool(caught.value.hint)) == (6, True)
    assert not (tmp_path / "pwned.txt").exists()


@pytest.mark.parametrize("config", [{"input_dim": None}, {"n_modules": 0}, {"hidden_dim": "512"}, {"output_dim": 2.5}])
def test_a_config_that_makes_no_sense(config: dict[str, Any], tmp_path: Path) -> None:
    """Catches sizes that are believed, and fail later as shapes."""
    write_kvzap(tmp_path, tiny(), **config)
    with pytest.raises(GateMismatch, match="is not a whole number above 0"):
        read_gate_spec(tmp_path, id="tiny")


def test_a_file_of_another_name_is_no_gates(tmp_path: Path) -> None:
    """Catches a file of other dimensions that is read as if it had 16."""
    write_fastkvzip(tmp_path, tiny())
    (tmp_path / FAST).rename(tmp_path / "q3_dim8_sink16.pt")
    with pytest.raises(ModelNotFound, match="holds no gates"):
        read_gates(tmp_path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_scoring_allocates_what_the_plan_counts(kind: str, dtype: Dtype, tmp_path: Path) -> None:
    """Catches a chunk whose scores take more than a budget leaves to them."""
    spec = tiny(num_attention_heads=32, hidden_size=96, intermediate_size=1, vocab_size=2)
    write(kind, tmp_path, spec)
    gate, tensors, _, _ = read_gates(tmp_path)
    module = build_gates(gate, spec, tensors, dtype=TORCH_DTYPES[dtype], device="cpu")[0]
    hidden, positions = torch.randn(1, 512, 96, dtype=TORCH_DTYPES[dtype]), torch.arange(512)[None]
    with torch.inference_mode(), LiveBytes() as live:
        module(hidden, positions)
    run = make_plan(spec, gate, PlanOptions(kv_budget=8, prefill_chunk=512, max_inflight=1, dtype=dtype)).run
    planned = _others_gate_bytes(run) - 512 * 3 * 96 * DTYPE_BYTES[dtype] - _inputs_bytes(run, run.step_tokens)
    assert planned * 0.99 <= live.peak <= planned
