"""Catches a plan that promises too little memory, gives up the wrong thing, or offers what does not fit either."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.products import PRODUCTS
from trimkv_cli.errors import ContextOverflow, DoesNotFit, UsageError
from trimkv_cli.model.machine import Machine
from trimkv_cli.model.profiles import load_profile
from trimkv_cli.model.spec import GateSpec, GgufForm, ModelSpec, full_gate, keydiff_gate, streaming_gate
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.plan.compare import alternatives
from trimkv_cli.plan.plan import Plan, make_plan
from trimkv_cli.units import SequenceBytes, parse_kv_budget, parse_size

MIB = 2**20
CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SPEC = ModelSpec.from_config(CONFIG)
WINDOWED = ModelSpec.from_config(
    {**CONFIG, "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 3, "dtype": "float32"}
)
STORED = replace(SPEC, gguf=GgufForm(bytes=1, types="Q4_0", packing=SPEC.packing("int4")))
GATE = GateSpec(variant="rg", id="gate", hidden=64, memory_size=512, trained_context=4096)
GATES = [GATE, streaming_gate(), full_gate(), GateSpec(variant="rg10", id="dynamic", hidden=64, memory_size=64)]


def read_command(command: str, device: str = "cpu") -> PlanOptions:
    """Read a counter-offer as the command line does."""
    words = shlex.split(command)[2:]
    values: dict[str, Any] = {"device": device}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        name = flag.removeprefix("--").replace("-", "_")
        readers = {"budget": parse_size, "kv_budget": parse_kv_budget, "dtype": str, "kv_dtype": str, "quantize": str}
        values[name] = readers.get(name, int)(value)
    return PlanOptions(**values)


def codes(plan: Plan) -> list[str]:
    return [warning.code for warning in plan.warnings]


def test_without_a_budget_everything_is_as_trained() -> None:
    plan = make_plan(SPEC, GATE, PlanOptions())
    assert (plan.fits, plan.run.kv_budget, plan.run.rows, plan.run.prefill_chunk, plan.run.dtype) == (
        True,
        512,
        8,
        512,
        "fp32",
    )
    assert plan.budget_bytes is None
    assert plan.run.part_bytes("runtime") == 0


def test_a_gpu_runs_the_models_own_dtype_and_more_rows() -> None:
    plan = make_plan(SPEC, GATE, PlanOptions(device="cuda"))
    assert (plan.run.dtype, plan.run.kv_dtype, plan.run.rows) == ("bf16", "bf16", 64)


def test_the_cache_is_what_is_allocated() -> None:
    import torch

    from trimkv_cli.cache.retention_cache import RetentionCache

    plan = make_plan(WINDOWED, GATE, PlanOptions(kv_budget=130, max_inflight=3))
    cache = RetentionCache(
        rows=3,
        kv_budget=130,
        num_kv_heads=WINDOWED.num_kv_heads,
        head_dim=WINDOWED.head_dim,
        windows=WINDOWED.windows,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert plan.run.part_bytes("kv") == cache.nbytes
    assert plan.run.part_bytes("shared_prefix") == cache.nbytes // 3
    assert plan.run.part_bytes("journal") == cache.journal_nbytes // 3 * 4


def test_one_sequence_shares_nothing() -> None:
    assert make_plan(SPEC, GATE, PlanOptions(max_inflight=1)).run.part_bytes("shared_prefix") == 0
    assert make_plan(SPEC, GATE, PlanOptions(prefill_chunk=0)).run.part_bytes("shared_prefix") == 0


def test_decode_that_is_padded_to_eight_rows_has_eight_rows_of_cache() -> None:
    plan = make_plan(SPEC, GATE, PlanOptions(max_inflight=2, padded_rows=8))
    assert (plan.run.rows, plan.run.part_bytes("kv")) == (2, 8 * plan.run.kv_bytes_per_row)


@pytest.mark.parametrize(
    ("profile", "slot_bytes"),
    [
        ("qwen3-1.7b-math", 114_688),
        ("qwen3-4b-math", 147_456),
        ("qwen3-8b-math", 147_456),
        ("qwen3-14b-math", 163_840),
        ("phi-3-mini-128k-instruct", 393_216),
    ],
)
def test_the_bytes_of_released_models(profile: str, slot_bytes: int) -> None:
    loaded = load_profile(profile)
    assert loaded.spec is not None
    assert loaded.gate is not None
    plan = make_plan(loaded.spec, loaded.gate, PlanOptions(device="cuda", kv_budget=1))
    assert loaded.spec.kv_bytes_per_token(2) == slot_bytes
    assert plan.run.full_cache_bytes(1000) == 1000 * slot_bytes
    assert plan.run.kv_bytes_per_row == slot_bytes + 8 * loaded.spec.num_layers * loaded.spec.num_kv_heads


def test_qwen3_4b_costs_2304_bytes_a_slot_beside_keys_and_values() -> None:
    spec = load_profile("qwen3-4b-math").spec
    assert spec is not None
    assert spec.kv_bytes_per_row(1, 2) == 147_456 + 2_304


def test_a_kv_budget_in_bytes_is_a_division() -> None:
    per_slot = SPEC.kv_bytes_per_row(1, 4)
    plan = make_plan(SPEC, GATE, PlanOptions(kv_budget=SequenceBytes(amount=per_slot * 100 + 5)))
    assert plan.run.kv_budget == 100
    with pytest.raises(UsageError, match="hold no slot"):
        make_plan(SPEC, GATE, PlanOptions(kv_budget=SequenceBytes(amount=per_slot - 1)))


@pytest.mark.parametrize("field", ["kv_budget", "max_inflight", "context"])
def test_zero_is_a_usage_error(field: str) -> None:
    with pytest.raises(UsageError, match="too small"):
        PlanOptions(**{field: 0})


def test_a_context_past_the_models_positions_is_refused() -> None:
    with pytest.raises(ContextOverflow, match="8192"):
        make_plan(SPEC, GATE, PlanOptions(context=8193))


def test_more_slots_than_trained_is_a_warning() -> None:
    assert codes(make_plan(SPEC, GATE, PlanOptions(kv_budget=513))) == ["kv_budget_above_trained"]
    assert codes(make_plan(SPEC, GATE, PlanOptions(kv_budget=512))) == []
    several = replace(GATE, memory_size=128, largest_memory_size=512)
    assert codes(make_plan(SPEC, several, PlanOptions(kv_budget=513))) == ["kv_budget_above_trained"]
    assert codes(make_plan(SPEC, several, PlanOptions(kv_budget=512))) == []


def test_far_fewer_slots_than_trained_are_a_warning() -> None:
    """Catches answers that fall apart at a budget that nobody warned of: below a quarter it is said."""
    assert codes(make_plan(SPEC, GATE, PlanOptions(kv_budget=127))) == ["kv_budget_below_trained"]
    assert codes(make_plan(SPEC, GATE, PlanOptions(kv_budget=128))) == []
    assert codes(make_plan(SPEC, replace(GATE, memory_size=None), PlanOptions(kv_budget=2))) == []
    assert codes(make_plan(SPEC, GATE, PlanOptions(default_kv_budget=64))) == []


def test_more_slots_than_positions_are_honoured_and_named() -> None:
    """Catches a refusal of budgets that hold everything, or a silent clamp."""
    plan = make_plan(SPEC, GATE, PlanOptions(kv_budget=10_000))
    assert plan.run.kv_budget == 10_000
    assert codes(plan) == ["kv_budget_above_trained", "kv_budget_above_positions"]


def test_a_longer_context_than_trained_is_a_warning() -> None:
    assert codes(make_plan(SPEC, GATE, PlanOptions(context=5000))) == ["context_above_trained"]


def test_gates_with_a_shared_budget_are_a_warning() -> None:
    assert codes(make_plan(SPEC, GATES[3], PlanOptions())) == ["budget_per_head"]


def test_the_trained_slots_are_no_more_than_positions() -> None:
    plan = make_plan(replace(SPEC, max_positions=200), GATE, PlanOptions())
    assert plan.run.kv_budget == 200
    assert "200 slots per head: as many as the model has positions" in plan.choices


def test_streaming_says_where_its_size_comes_from() -> None:
    plan = make_plan(SPEC, streaming_gate(), PlanOptions())
    assert plan.run.kv_budget == 1024
    assert "1024 slots per head: the default without trained gates" in plan.choices


def test_a_full_cache_has_a_slot_for_every_token_of_the_context() -> None:
    assert make_plan(SPEC, full_gate(), PlanOptions(context=700)).run.kv_budget == 700
    with pytest.raises(UsageError, match="cannot hold"):
        make_plan(SPEC, full_gate(), PlanOptions(context=700, kv_budget=699))


def test_a_profiles_default_gives_way_to_the_budget_and_a_flag_does_not() -> None:
    limit = make_plan(SPEC, GATE, PlanOptions(budget=2**40, kv_budget=64, max_inflight=1, dtype="fp32")).run.total_bytes
    given_way = make_plan(SPEC, GATE, PlanOptions(budget=limit, default_kv_budget=256, max_inflight=1, dtype="fp32"))
    assert given_way.fits
    asked = PlanOptions(budget=limit, kv_budget=4096, prefill_chunk=512, max_inflight=1, dtype="fp32")
    assert not make_plan(SPEC, GATE, asked).fits


def test_a_tight_budget_costs_rows_then_precision_then_chunk_then_trained_slots_and_says_so() -> None:
    """Catches another order than the documented one, and a loss that is not said."""
    spec = ModelSpec.from_config({**CONFIG, "num_hidden_layers": 36, "hidden_size": 512, "intermediate_size": 2048})
    gate, seen = replace(GATE, memory_size=4096), []
    for budget in range(1200 * MIB, 440 * MIB, -MIB // 2):
        plan = make_plan(spec, gate, PlanOptions(budget=budget))
        if not plan.fits:
            break
        assert plan.run.total_bytes <= budget
        precision = (("int4", "int8", "none").index(plan.run.quantize), plan.run.dtype == "fp32")
        seen.append((plan.run.kv_budget, plan.run.prefill_chunk, precision, plan.run.rows))
        assert ("weights_quantised" in codes(plan)) == (plan.run.quantize != "none")
        assert ("kv_budget_below_trained" in codes(plan)) == (plan.run.kv_budget < 4096)
        assert ("kv_budget_reduced" in codes(plan)) == (plan.run.kv_budget < 4096)
        assert ("prefill_chunk_reduced" in codes(plan)) == (plan.run.prefill_chunk < 512)
        assert ("dtype_reduced" in codes(plan)) == (plan.run.dtype != "fp32")
    assert seen == sorted(seen, reverse=True)
    assert {slots for slots, _, _, _ in seen} > {4096}
    assert {level for _, _, (level, _), _ in seen} == {0, 1, 2}


def test_a_refusal_names_the_budget_that_would_do() -> None:
    plan = make_plan(SPEC, GATE, PlanOptions(budget=MIB))
    assert not plan.fits
    assert f"trimkv plan --budget {plan.run.total_bytes}" in plan.offers
    assert len(plan.offers) >= 2
    with pytest.raises(DoesNotFit) as caught:
        plan.ensure_fits()
    assert caught.value.hint == plan.offers[0]


OPTIONS = st.builds(
    PlanOptions,
    budget=st.integers(1, 700) | st.integers(440, 520),
    kv_budget=st.none() | st.integers(1, 9000) | st.integers(10_000, 10**8).map(lambda n: SequenceBytes(amount=n)),
    prefill_chunk=st.none() | st.sampled_from([0, 1, 32, 64, 100, 512, 4096]),
    max_inflight=st.none() | st.integers(1, 100),
    context=st.none() | st.integers(1, 8192),
    dtype=st.sampled_from(["auto", "fp32", "bf16"]),
    kv_dtype=st.sampled_from(["auto", "fp32", "bf16"]),
    quantize=st.sampled_from(["auto", "none", "int8", "int4", "nf4", "stored"]),
    machine=st.sampled_from([Machine(), Machine(products=PRODUCTS), Machine(products={**PRODUCTS, "int4@1": 999.0})]),
    can_quantise=st.booleans(),
    device=st.sampled_from(["cpu", "cuda"]),
)


@settings(max_examples=150)
@given(options=OPTIONS, gate=st.sampled_from(GATES), spec=st.sampled_from([SPEC, WINDOWED, STORED]))
def test_every_offer_fits_when_it_is_tried(options: PlanOptions, gate: GateSpec, spec: ModelSpec) -> None:
    options = replace(options, budget=(options.budget or 0) * MIB)
    try:
        plan = make_plan(spec, gate, options)
    except UsageError:
        return
    assert plan.fits == (plan.run.total_bytes <= (options.budget or 0))
    assert plan.fits or len(set(plan.offers)) >= 2
    for offer in plan.offers:
        here = {"can_quantise": options.can_quantise, "machine": options.machine}
        retried = make_plan(spec, gate, replace(read_command(offer, options.device), **here))
        assert retried.fits, offer
        assert retried.run.total_bytes <= (retried.budget_bytes or 0)


def test_above_what_the_gate_was_trained_for_slots_go_before_precision() -> None:
    """Catches a profile's generous default that costs quality of the weights."""
    asked = PlanOptions(default_kv_budget=2048, max_inflight=1, budget=2**40)
    whole = make_plan(SPEC, GATE, asked)
    assert (whole.run.kv_budget, whole.run.quantize) == (2048, "none")
    tight = make_plan(SPEC, GATE, replace(asked, budget=whole.run.total_bytes - 1))
    assert (tight.run.kv_budget, tight.run.quantize, tight.run.dtype) == (1024, "none", "fp32")


def test_fp8_needs_a_gpu() -> None:
    """Catches a dtype that a CPU would fail on in the first step."""
    with pytest.raises(UsageError, match="fp8"):
        make_plan(SPEC, GATE, PlanOptions(kv_dtype="fp8"))
    halved = make_plan(SPEC, GATE, PlanOptions(kv_dtype="fp8", device="cuda"))
    assert halved.run.kv_bytes_per_row == SPEC.kv_bytes_per_row(512, 1)


@pytest.mark.parametrize(
    ("capability", "workspace"), [((8, 0), 8320 * 1024), ((9, 0), 2**25), ((12, 0), 8320 * 1024), (None, 2**25)]
)
def test_graphs_keep_logits_and_two_workspaces(capability: tuple[int, int] | None, workspace: int) -> None:
    """Catches memory inside the allocator's cap that no part counts: it is short where a budget is tight."""
    machine = Machine(cuda_capability=capability)
    for rows, captured in ((1, 1), (7, 1 + 2 + 4 + 7), (64, 127)):
        asked = PlanOptions(device="cuda", machine=machine, max_inflight=rows, dtype="bf16")
        logits = captured * SPEC.vocab_size * 2
        through = rows * 6 * (256 + 2 * 2 * 32) * 2  # hidden states, keys and values of all layers
        planned = make_plan(SPEC, GATE, asked).run.part_bytes("graphs")
        sampling = min(rows, 7) * (62 * SPEC.vocab_size + 8 * 1024)  # of 1, 2 and 4 rows: more are never chosen for
        assert planned == 64 * 2**20 + logits + sampling + through + 2 * workspace
    assert make_plan(SPEC, GATE, PlanOptions()).run.part_bytes("graphs") == 0
    graphs = [
        make_plan(SPEC, gate, PlanOptions(device="cuda", max_inflight=2, kv_budget=7, dtype="bf16")).run.part_bytes(
            "graphs"
        )
        for gate in (keydiff_gate(), full_gate())
    ]
    assert graphs[0] - graphs[1] == 2 * 8 * 2 * (32 * 6 + 16)  # keys of slots and of new tokens, joined and widened


@pytest.mark.parametrize(("family", "matrices"), [("qwen3", 2), ("phi3", 0), ("olmo2", 0)])
def test_matrices_that_become_one_are_there_twice_before_a_gpu_decodes(family: str, matrices: int) -> None:
    """Catches a model that runs within its budget and cannot be loaded within it."""
    wide = replace(SPEC, model_type=family, hidden_size=5120, intermediate_size=51_200)
    run = make_plan(wide, full_gate(), PlanOptions(device="cuda", dtype="bf16", kv_budget=9, max_inflight=1)).run
    steps = sum(run.part_bytes(name) for name in ("workspace", "logits", "graphs"))
    assert run.part_bytes("loading") == max(0, matrices * 5120 * 51_200 * 2 - steps)
    assert steps < 2 * 5120 * 51_200 * 2


@pytest.mark.parametrize(("capability", "runs"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_fp8_needs_a_gpu_that_has_it(capability: tuple[int, int], runs: bool) -> None:
    """Catches a kernel that does not compile on an A100, named by its compiler, and a comparison that advises it."""
    asked = PlanOptions(device="cuda", machine=Machine(cuda_capability=capability), budget=2**34)
    assert ("fp8" in {each.kv_dtype for each in alternatives(SPEC, GATE, asked)}) == runs
    if runs:
        assert make_plan(SPEC, GATE, replace(asked, kv_dtype="fp8")).run.kv_dtype == "fp8"
        return
    with pytest.raises(UsageError, match=r"need a GPU of capability 8\.9, and this one's is 8\.0"):
        make_plan(SPEC, GATE, replace(asked, kv_dtype="fp8"))


@pytest.mark.parametrize(("chunk", "dtype", "packs"), [(64, "bf16", True), (63, "bf16", False), (64, "fp32", False)])
def test_a_plan_counts_the_keys_that_torch_lays_out_anew_on_cpus_with_matrix_tiles(
    chunk: int, dtype: str, packs: bool
) -> None:
    """Catches a workspace that is too small on such CPUs only, where most tests never run."""
    asked = PlanOptions(kv_budget=512, prefill_chunk=chunk, max_inflight=1, dtype=dtype, device="cpu")
    with_tiles, without = (
        make_plan(SPEC, GATE, replace(asked, machine=Machine(packs_keys=tiles))).run.part_bytes("workspace")
        for tiles in (True, False)
    )
    keys = 512 + chunk
    packed = 2 * keys * SPEC.num_kv_heads * SPEC.head_dim * 2 + 512 * SPEC.head_dim * 2
    assert with_tiles - without == (packed if packs else 0)


@pytest.mark.parametrize(("rows", "dtype", "counted"), [(2, "bf16", False), (3, "bf16", True), (6, "fp32", False)])
def test_a_plan_counts_the_matrices_that_several_rows_in_16_bits_lay_out_anew(
    rows: int, dtype: str, counted: bool
) -> None:
    """Catches a budget that several rows in bf16 break on CPUs with vectors of 512 bits."""
    asked = PlanOptions(
        kv_budget=64, max_inflight=rows, dtype=dtype, device="cpu", machine=Machine(reorders_halves=True)
    )
    matrices = SPEC.num_layers * sum(outputs * inputs for outputs, inputs in SPEC.matrices) * 2
    assert make_plan(SPEC, GATE, asked).run.part_bytes("reordered") == (matrices if counted else 0)
    plain = make_plan(SPEC, GATE, replace(asked, machine=Machine()))
    assert plain.run.part_bytes("reordered") == 0


@pytest.mark.parametrize(("sinks", "asked"), [(64, 64), (4, 4), (4, 1), (2000, None)])
def test_sinks_that_fill_all_slots_are_refused(sinks: int, asked: int | None) -> None:
    """Catches a cache that holds the first tokens for ever and never a later one, without a word."""
    with pytest.raises(UsageError, match=f"{sinks} sinks leave none of") as caught:
        make_plan(SPEC, streaming_gate(sinks), PlanOptions(kv_budget=asked))
    assert f"--kv-budget {2 * sinks}" in str(caught.value.hint)


def test_a_budget_never_makes_slots_so_few_that_sinks_fill_them() -> None:
    """Catches the same where the plan itself chooses the slots, at first or later."""
    gate = streaming_gate(100)
    roomy = make_plan(SPEC, gate, PlanOptions(kv_budget=200, max_inflight=1))
    with pytest.raises(UsageError, match="100 sinks"):
        roomy.resized(100, limit=None)
    for budget in range(roomy.run.total_bytes // 4, roomy.run.total_bytes, roomy.run.total_bytes // 16):
        found = make_plan(SPEC, gate, PlanOptions(budget=budget, max_inflight=1))
        assert found.run.kv_budget > 100 or not found.fits


def test_a_refusal_that_is_close_says_by_how_much() -> None:
    """Catches the same rounded size given for what is needed and for the budget."""
    asked = PlanOptions(
        budget=10 * MIB, kv_budget=8192, max_inflight=8, prefill_chunk=512, dtype="fp32", quantize="none"
    )
    needed = make_plan(SPEC, GATE, asked).run.total_bytes
    with pytest.raises(DoesNotFit, match=r"40\.0 KiB short") as caught:
        make_plan(SPEC, GATE, replace(asked, budget=needed - 40 * 2**10)).ensure_fits()
    assert len(set(re.findall(r"[0-9.]+ [MG]iB", caught.value.message))) == 2


def test_a_gpu_reads_chunks_together_as_far_as_the_budget_goes() -> None:
    """Catches a workspace of one chunk beside forwards of eight, and chunks or precision given up for speed."""
    wide = make_plan(SPEC, GATE, PlanOptions(device="cuda", max_inflight=8)).run
    assert (wide.step_tokens, wide.prefill_chunk) == (4096, 512)
    assert make_plan(SPEC, GATE, PlanOptions(device="cuda", max_inflight=3)).run.step_tokens == 3 * 512
    assert make_plan(SPEC, GATE, PlanOptions(device="cuda", prefill_chunk=5000)).run.step_tokens == 5000
    assert make_plan(SPEC, GATE, PlanOptions(max_inflight=8)).run.step_tokens == 512
    narrow = replace(wide, prefill_rows=1)
    assert narrow.workspace_bytes < wide.workspace_bytes / 4
    tight = PlanOptions(device="cuda", max_inflight=8, budget=replace(narrow, counts_runtime=True).total_bytes)
    found = make_plan(SPEC, GATE, tight).run
    assert (found.step_tokens, found.prefill_chunk, found.kv_budget, found.dtype) == (512, 512, 512, "bf16")
