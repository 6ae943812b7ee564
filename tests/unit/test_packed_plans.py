"""Plans with packed weights: their bytes by hand, when they are chosen, and what is said of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.products import PRODUCTS
from trimkv_cli.commands.models import _facts, _table
from trimkv_cli.commands.plan import _as_json, _as_text
from trimkv_cli.commands.run.work import as_before
from trimkv_cli.errors import DoesNotFit, UnsupportedModel, UsageError
from trimkv_cli.loading import loader, measuring
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import find_source
from trimkv_cli.model import machine as machines
from trimkv_cli.model.machine import Machine
from trimkv_cli.model.profiles import load_profile
from trimkv_cli.model.spec import GgufForm, ModelSpec, streaming_gate
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.plan.compare import alternatives
from trimkv_cli.plan.plan import Plan, make_plan

MIB, GATE = 2**20, streaming_gate()
SMOLLM2 = load_profile("smollm2-135m-instruct").spec or pytest.fail("no spec")
FOLDER = replace(SMOLLM2, gguf=None)
LAYER = 2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576  # weights of q and o, k and v, and the MLP
VOCABULARY = 49152 * 576
PACKED_VOCABULARY = VOCABULARY + 4 * 49152 + 4 * 576  # factors of rows and columns
OTHER = 61 * 576  # norms
SLOW = Machine(products={**PRODUCTS, "int8@1": 401.0, "int4@1": 402.0})
SLOW_INT8 = Machine(products={**PRODUCTS, "int8@1": 401.0})


def plan(spec: ModelSpec = SMOLLM2, **options: object) -> Plan:
    return make_plan(spec, GATE, PlanOptions(**{"device": "cpu", "max_inflight": 1, **options}))  # type: ignore[arg-type]


def codes(made: Plan) -> list[str]:
    return [warning.code for warning in made.warnings]


@pytest.mark.parametrize(("spec", "quantize"), [(FOLDER, "int4"), (SMOLLM2, "int4"), (SMOLLM2, "stored")])
def test_four_bits_by_hand(spec: ModelSpec, quantize: str) -> None:
    """Catches scales, zero points or norms that are forgotten, and a tied head that counts twice."""
    run = plan(spec, quantize=quantize).run
    assert run.part_bytes("weights") == 30 * LAYER * 5 // 8 + PACKED_VOCABULARY + 4 * OTHER
    assert run.bits_per_weight == 5.65


def test_eight_bits_by_hand() -> None:
    """Catches scales that are forgotten, and a head of its own that is."""
    outputs = 576 * 2 + 192 * 2 + 1536 * 2 + 576
    packed = 30 * (LAYER + 4 * outputs) + PACKED_VOCABULARY
    assert plan(FOLDER, quantize="int8").run.part_bytes("weights") == packed + 4 * OTHER
    on_gpu = plan(FOLDER, quantize="int8", device="cuda").run.part_bytes("weights")
    assert on_gpu == 30 * (LAYER + 4 * outputs) + 2 * (VOCABULARY + OTHER)
    untied = replace(FOLDER, tied=False, weight_numel=FOLDER.weight_numel + VOCABULARY)
    assert plan(untied, quantize="int8").run.part_bytes("weights") == packed + 4 * OTHER + PACKED_VOCABULARY


def test_a_matrix_that_no_group_divides_stays_unpacked_and_is_counted() -> None:
    """Catches int4 that is planned where it cannot be, and a larger model that nobody hears of."""
    odd = replace(FOLDER, intermediate_size=1544)  # 1544 inputs are no whole groups, and outputs no whole tiles
    made = plan(odd, quantize="int4")
    attention, mlp = 2 * 576 * 576 + 2 * 192 * 576, 3 * 1544 * 576
    plain = odd.weight_numel - 30 * attention - VOCABULARY
    assert plain > 30 * mlp - 30 * 3 * 8 * 576
    assert made.run.part_bytes("weights") == 30 * attention * 5 // 8 + PACKED_VOCABULARY + 4 * plain
    assert any(choice.startswith("90 matrices stay in fp32") for choice in made.choices)


def test_a_prompt_is_unpacked_into_scratch_that_is_counted() -> None:
    """Catches scratch that the budget does not hold, and one that is counted where prompts are never that long."""
    for quantize, dense in (("int4", "bf16"), ("stored", "fp32")):
        here = Machine(products={**PRODUCTS, "fp32@512": 4_000.0 if dense == "fp32" else 12_000.0})
        made = plan(quantize=quantize, machine=here)
        assert made.run.part_bytes("unpacked") == 1536 * 576 * (2 if dense == "bf16" else 4)
        assert any(f"multiplied in {dense}" in choice and "measured here" in choice for choice in made.choices)
    assert plan(quantize="int4", prefill_chunk=63).run.part_bytes("unpacked") == 0
    assert plan(quantize="int4", prefill_chunk=64).run.part_bytes("unpacked") > 0
    assert plan(quantize="none").run.part_bytes("unpacked") == plan(quantize="int8").run.part_bytes("unpacked") == 0
    assert any("assumed; trimkv doctor --measure" in choice for choice in plan(quantize="int4").choices)


def test_a_product_of_eight_bits_by_hand() -> None:
    """Catches a workspace without the sums in 32 bits, and the planes that the widest input is rounded to."""
    run = plan(quantize="int8", prefill_chunk=128).run
    beside, inputs = 4 * (4 * 576 + 1536), 24 + 2 * 64 * 4
    assert run.part_bytes("workspace") == 128 * (beside + max(2 * 576 + 16 * 1536, 18 * 1536) + inputs)
    halves = plan(quantize="int8", prefill_chunk=512, dtype="bf16").run
    some = max(128 * 22 * 1536 + 512 * 4 * 576, 128 * (2 * 576 + 16 * 1536) + 512 * 4 * 1536)
    assert halves.part_bytes("workspace") == 512 * (beside // 2 + 24 + 2 * 64 * 2) + some


def test_nothing_of_bitsandbytes_is_counted_for_packed_weights() -> None:
    """Catches 64 MiB of a library that is not imported."""
    quantised = {
        each: plan(quantize=each, budget=2**33).run.part_bytes("quantiser") for each in ("int4", "int8", "nf4")
    }
    assert (quantised["int4"], quantised["int8"], quantised["nf4"] > 0) == (0, 0, True)


def test_a_gguf_file_stays_packed_on_a_cpu_where_that_pays() -> None:
    """Catches fp32 by default where a quarter of it is faster, and packed weights where they are slower."""
    made = plan()
    assert (made.run.quantize, codes(made)) == ("stored", [])
    assert "stored weights: int4: Q4_1 ×210; int8: Q8_0 ×1" in made.choices
    slower = plan(machine=SLOW)
    assert slower.run.quantize == "none"
    assert "unpacked weights: packed ones are slower on this processor (measured here)" in slower.choices
    assert plan(device="cuda").run.quantize == plan(device="mps").run.quantize == plan(FOLDER).run.quantize == "none"
    assert plan(quantize="none").run.quantize == "none"
    assert plan(replace(SMOLLM2, gguf=GgufForm(bytes=1, types="F16"))).run.quantize == "none"


def _levels(spec: ModelSpec, **options: object) -> list[str]:
    """Return the forms that are chosen as a budget shrinks."""
    found = [plan(spec, budget=size * MIB, dtype="fp32", **options) for size in range(2000, 500, -20)]
    return list(dict.fromkeys(made.run.quantize for made in found if made.fits))


def test_a_budget_takes_the_highest_precision_that_fits() -> None:
    """Catches nf4 on a CPU, int8 where it is slower than both its neighbours, and a need of bitsandbytes."""
    large = replace(FOLDER, vocab_size=1024, num_layers=60, weight_numel=60 * LAYER + 1024 * 576 + OTHER)
    assert _levels(large, can_quantise=False) == ["none", "int8", "int4"]
    assert _levels(large, machine=SLOW_INT8) == ["none", "int4"]
    assert _levels(large, device="cuda")[-1] in ("int8", "nf4")
    assert _levels(large, device="cuda", can_quantise=False) == ["none"]
    forced = next(made for size in range(1400, 0, -20) if (made := plan(large, budget=size * MIB)).run.form == "int8")
    assert "weights_quantised" in codes(forced)


def test_a_smaller_form_is_offered_where_a_fixed_one_does_not_fit() -> None:
    """Catches a counter-offer of nf4 on a CPU."""
    fixed = plan(replace(FOLDER, num_layers=300, weight_numel=300 * LAYER + VOCABULARY), quantize="none", budget=2**31)
    assert not fixed.fits
    assert any("--quantize int4" in offer for offer in fixed.offers)
    assert not any("nf4" in offer for offer in fixed.offers)
    with pytest.raises(DoesNotFit):
        fixed.ensure_fits()


def test_nf4_on_a_cpu_is_said_to_be_slow() -> None:
    """Catches minutes that nobody was warned of."""
    assert codes(plan(quantize="nf4")) == ["slow_nf4"]
    assert codes(plan(quantize="nf4", device="cuda")) == codes(plan(quantize="int4")) == []


@pytest.mark.parametrize(
    ("spec", "options", "message", "hint"),
    [
        (FOLDER, {"quantize": "int4", "device": "cuda"}, "on a CPU only, not on cuda", "--quantize nf4"),
        (FOLDER, {"quantize": "int4", "device": "mps"}, "on a CPU only, not on mps", "--quantize none"),
        (SMOLLM2, {"quantize": "stored", "device": "cuda"}, "packed on a CPU only, not on cuda", "--quantize none"),
        (FOLDER, {"quantize": "stored"}, "is for GGUF files", "--quantize int4"),
        (FOLDER, {"quantize": "q4"}, "'q4' is not a quantisation", "one of auto, none, int8, int4, nf4, stored"),
    ],
)
def test_what_a_device_does_not_do_is_refused(
    spec: ModelSpec, options: dict[str, str], message: str, hint: str
) -> None:
    """Catches a form that fails when the weights are being read."""
    with pytest.raises(UsageError, match=message) as caught:
        plan(spec, **options)
    assert caught.value.hint == hint


def test_hybrids_are_not_packed() -> None:
    """Catches matrices of linear attention that no packed product serves."""
    hybrid = ModelSpec.from_config(
        {
            "model_type": "qwen3_5_text",
            "vocab_size": 64,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "linear_conv_kernel_dim": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        }
    )
    with pytest.raises(UnsupportedModel, match="a hybrid"):
        plan(hybrid, quantize="int4")
    assert plan(hybrid, budget=2**33).run.quantize == "none"
    assert {each.quantize for each in alternatives(hybrid, GATE, PlanOptions(budget=2**33))} == {"none"}


def test_forms_are_compared_by_device() -> None:
    """Catches a comparison with forms that the device does not run."""
    on_cpu = [each.quantize for each in alternatives(SMOLLM2, GATE, PlanOptions(budget=2**32, can_quantise=False))]
    assert list(dict.fromkeys(on_cpu)) == ["none", "int8", "stored", "int4"]
    on_gpu = [each.quantize for each in alternatives(SMOLLM2, GATE, PlanOptions(budget=2**32, device="cuda"))]
    assert list(dict.fromkeys(on_gpu)) == ["none", "int8", "nf4"]


def test_a_processor_is_measured_once_and_only_for_packed_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Catches a second of measuring at every start, or before runs that pack nothing."""
    calls: list[int] = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {**PRODUCTS, "int4@1": 402.0}

    monkeypatch.setattr(machines, "_file", lambda: tmp_path / "machine.json")
    monkeypatch.setattr(measuring, "measure_products", measure)
    options = EngineOptions(model="smollm2-135m-instruct", max_inflight=1)
    source = find_source(options, weights=False)
    for asked, count, form in (
        (replace(options, quantize="none"), 0, "none"),
        (options, 1, "none"),  # packed ones are slower, as was measured
        (replace(options, quantize="stored"), 1, "stored"),
    ):
        found = loader.plan_for(source, asked, torch.device("cpu")).run
        assert (len(calls), found.quantize) == (count, form)


def test_a_resumed_run_keeps_the_form_of_the_first() -> None:
    """Catches answers in two precisions in one file after `doctor --measure` chose another."""
    assert as_before(EngineOptions(), {"quantize": "stored"}).quantize == "stored"
    assert as_before(EngineOptions(), {"quantize": "none"}).quantize == "none"
    assert as_before(EngineOptions(quantize="int8"), {"quantize": "stored"}).quantize == "int8"


def test_plan_and_models_say_how_many_bits_a_weight_has() -> None:
    """Catches two commands that compute them apart, and JSON without what a script chooses by."""
    made = plan()
    said = json.loads(_as_json(made, "m", 8192, requested=None, more={}))
    assert (said["quantize"], said["bits_per_weight"]) == ("stored", 5.65)
    assert said["products"] == {
        "measured": False,
        "unpacks_from": 64,
        "unpacks_to": "fp32",
        "forms": "int4: Q4_1 ×210; int8: Q8_0 ×1",
    }
    text = _as_text(made, "m", 8192)
    assert "stored: 5.65 bits per weight, computing in fp32" in text
    assert "5.85 bits per weight\n" in text
    facts = _facts("smollm2-135m-instruct", None, offline=True)
    assert (facts["bits_per_weight"], facts["weight_bytes"]) == (5.85, 269_030_016)
    assert "5.85 bits each; packed on a CPU as int4: Q4_1 ×210; int8: Q8_0 ×1" in _table(facts)
    assert "unpacked when loaded" in _as_text(plan(quantize="none"), "m", 8192)
