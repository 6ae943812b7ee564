"""Gates compute what the released ones computed, in the dtypes that the specification names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from trimkv_cli.cache.gate_files import read_gates
from trimkv_cli.cache.gates import FullGate, MlpGate, StreamingGate, build_gates, layer_shapes, tensor_key
from trimkv_cli.errors import GateMismatch
from trimkv_cli.model.spec import GateSpec, GateVariant, ModelSpec

GOLDEN = Path(__file__).parents[1] / "golden"
HIDDEN_SIZE, HIDDEN, KV_HEADS, LAYERS = 64, 32, 2, 3
KV_SIZE = 2 * KV_HEADS * 32  # what rg2 and rg3 read


def model_spec() -> ModelSpec:
    return ModelSpec.from_config(json.loads((GOLDEN / "qwen3_base/config.json").read_text()))


def gate_spec(variant: GateVariant) -> GateSpec:
    return GateSpec(variant=variant, id="gates", hidden=HIDDEN)


def width(variant: str) -> int:
    return KV_SIZE if variant in ("rg2", "rg3") else HIDDEN_SIZE


def random_tensors(variant: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = layer_shapes(variant=variant, input_size=width(variant), hidden=HIDDEN, num_kv_heads=KV_HEADS)
    return {
        tensor_key(layer, name): torch.randn(shape, generator=generator) * 0.3
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }


def build(
    variant: GateVariant, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32, hidden_act: str = "silu"
) -> nn.ModuleList:
    return build_gates(gate_spec(variant), model_spec(), tensors, dtype=dtype, device="cpu", hidden_act=hidden_act)


def layer(tensors: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    head = tensor_key(number, "")
    return {key.removeprefix(head): tensor for key, tensor in tensors.items() if key.startswith(head)}


def positions(batch: int, length: int) -> Tensor:
    return torch.arange(length).expand(batch, length)


@pytest.mark.parametrize("case", ["M8_B1_T24", "M10000_B1_T70"])
def test_released_gates_score_the_first_layer_as_the_released_code(case: str) -> None:
    """Catches a swapped layer, a missing bias, another activation: layer 0 sees only the embeddings' layer norm."""
    transformers = pytest.importorskip("transformers")
    golden = np.load(GOLDEN / "qwen3_rg_cases.npz")
    ids = np.concatenate([golden[f"{case}/input_ids"], golden[f"{case}/greedy_ids"]])
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / "qwen3_base", dtype=torch.float32)
    files = read_gates(GOLDEN / "qwen3_rg")
    gates = build_gates(files.gate, model_spec(), files.tensors, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        hidden_states = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor(ids)[None]))
        log_beta = gates[0](hidden_states, positions(1, len(ids)))
    expected = golden[f"{case}/log_beta"][0].T
    np.testing.assert_allclose(log_beta[0].numpy()[: len(expected)], expected, rtol=1e-4, atol=1e-5)


def test_three_layer_gate_is_the_formula() -> None:
    """Catches an rg10 gate that skips the second activation or gives linear3 a bias."""
    tensors = random_tensors("rg10")
    hidden_states = torch.randn(2, 5, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    for number, gate in enumerate(build("rg10", tensors)):
        t = layer(tensors, number)
        x = functional.silu(hidden_states @ t["linear1.weight"].T + t["linear1.bias"])
        x = functional.silu(x @ t["linear2.weight"].T + t["linear2.bias"])
        expected = functional.logsigmoid(x @ t["linear3.weight"].T + t["bias"])
        torch.testing.assert_close(gate(hidden_states, positions(2, 5)), expected)


@pytest.mark.parametrize("variant", ["rg", "rg10", "rg3"])
def test_result_is_float32_and_at_most_zero_in_half_precision(variant: GateVariant) -> None:
    """Catches a bias of 18 added in bfloat16, whose step of ⅛ there makes most tokens equal."""
    tensors = random_tensors(variant)
    for number in range(LAYERS):
        tensors[tensor_key(number, "bias")] = torch.full((KV_HEADS,), 18.0)
    gate = build(variant, tensors, torch.bfloat16)[1]
    log_beta = gate(torch.randn(3, 7, width(variant)).bfloat16(), positions(3, 7))
    assert log_beta.shape == (3, 7, KV_HEADS)
    assert log_beta.dtype == torch.float32
    assert (log_beta < 0).all()
    assert len(log_beta.unique()) > 30


def test_bias_is_added_in_float32() -> None:
    """Catches logits rounded to bfloat16 after the bias."""
    tensors = random_tensors("rg")
    tensors[tensor_key(0, "bias")] = torch.full((KV_HEADS,), 18.001)
    gate = build("rg", tensors, torch.bfloat16)[0]
    assert gate.bias.dtype == torch.float32
    assert gate.linear1.weight.dtype == torch.bfloat16
    zero = gate(torch.zeros(1, 1, HIDDEN_SIZE).bfloat16(), positions(1, 1))
    x = functional.silu(tensors[tensor_key(0, "linear1.bias")].bfloat16())
    logits = (tensors[tensor_key(0, "linear2.weight")].bfloat16() @ x).float() + 18.001
    torch.testing.assert_close(zero[0, 0], functional.logsigmoid(logits), rtol=1e-3, atol=0)


def test_each_layer_has_its_own_bias_beside_a_shared_linear3() -> None:
    """Catches layers that take the first layer's tensors because the file shares one."""
    tensors = random_tensors("rg10")
    for number in range(LAYERS):
        tensors[tensor_key(number, "linear3.weight")] = tensors[tensor_key(0, "linear3.weight")]
        tensors[tensor_key(number, "bias")] = torch.full((KV_HEADS,), float(number))
    gates = build("rg10", tensors)
    assert [gate.bias[0].item() for gate in gates] == [0.0, 1.0, 2.0]
    assert all(torch.equal(gate.linear3.weight, gates[0].linear3.weight) for gate in gates)


def test_other_activations_are_those_of_transformers() -> None:
    """Catches a hard-wired SiLU."""
    tensors = random_tensors("rg")
    gates = build("rg", tensors, hidden_act="gelu_pytorch_tanh")
    hidden_states = torch.randn(1, 4, HIDDEN_SIZE)
    t = layer(tensors, 0)
    x = functional.gelu(hidden_states @ t["linear1.weight"].T + t["linear1.bias"], approximate="tanh")
    expected = functional.logsigmoid(x @ t["linear2.weight"].T + t["bias"])
    torch.testing.assert_close(gates[0](hidden_states, positions(1, 4)), expected)


def test_an_unknown_activation_is_named() -> None:
    """Catches a KeyError instead of an error with a hint."""
    with pytest.raises(GateMismatch, match="'swoosh'"):
        build("rg", random_tensors("rg"), hidden_act="swoosh")


def test_streaming_keeps_sinks_and_recency() -> None:
    """Catches sinks counted per chunk instead of by position."""
    gate = StreamingGate(num_kv_heads=KV_HEADS)
    late = torch.tensor([[2, 3, 4, 5], [100, 101, 102, 103]])
    log_beta = gate(torch.zeros(2, 4, HIDDEN_SIZE).bfloat16(), late)
    assert log_beta.dtype == torch.float32
    assert log_beta[..., 0].tolist() == log_beta[..., 1].tolist() == [[0, 0, -1, -1], [-1, -1, -1, -1]]


def test_constant_gates_need_no_tensors() -> None:
    """Catches a streaming run that asks for a gate file."""
    streaming, full = build("streaming", {}), build("none", {})
    assert [type(gate) for gate in streaming] == [StreamingGate] * LAYERS
    assert [type(gate) for gate in full] == [FullGate] * LAYERS
    assert full[0](torch.zeros(1, 3, HIDDEN_SIZE), positions(1, 3)).tolist() == [[[0.0] * KV_HEADS] * 3]


def test_gates_are_frozen() -> None:
    """Catches gates that drag autograd state through inference."""
    gates = build("rg", random_tensors("rg"))
    assert isinstance(gates[0], MlpGate)
    assert not any(parameter.requires_grad for parameter in gates.parameters())


@pytest.mark.parametrize("variant", ["rg", "rg10", "rg2", "rg3"])
def test_declared_shapes_are_those_of_the_module(variant: GateVariant) -> None:
    """Catches a check of files that disagrees with what the module loads."""
    gate = build(variant, random_tensors(variant))[0]
    shapes = layer_shapes(variant=variant, input_size=width(variant), hidden=HIDDEN, num_kv_heads=KV_HEADS)
    assert {name: tuple(tensor.shape) for name, tensor in gate.state_dict().items()} == shapes
