"""The authors' own runs: the released gate format, end to end, token for token and slot for slot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimkv_cli.cache.gate_files import read_gates
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import Request, SamplingParams

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "qwen3_rg_cases.json").read_text())
OPTIONS = EngineOptions(
    model=str(GOLDEN / "qwen3_base"), gates=str(GOLDEN / "qwen3_rg"), prefill_chunk=0, max_inflight=1, threads=1
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_tokens_kept_positions_and_log_beta(case: dict[str, Any]) -> None:
    """Catches any difference in gate, score, tie, age or order of attention and eviction."""
    data = {
        name.partition("/")[2]: value
        for name, value in np.load(GOLDEN / "qwen3_rg_cases.npz").items()
        if name.startswith(f"{case['case']}/")
    }
    engine = load_engine(replace(OPTIONS, kv_budget=str(case["memory_size"])))
    prompt = tuple(data["input_ids"].tolist())
    for steps in (0, 16, 32, 48):
        engine.start_trace()
        params = SamplingParams(max_tokens=steps + 1, temperature=0.0, ignore_eos=True)
        request = Request(id=f"case-{steps}", prompt_token_ids=prompt, params=params, keep=True)
        tokens = [token for event in engine.generate([request]) for token in event.token_ids]
        assert tokens[:48] == data["greedy_ids"].tolist()[: steps + 1]
        np.testing.assert_array_equal(np.array(engine.kept.positions(request.id)), data[f"kept_{steps}"])
        log_beta = np.array(engine.traced_log_beta())
        np.testing.assert_allclose(log_beta, data["log_beta"][..., : log_beta.shape[-1]], rtol=1e-4, atol=1e-5)
        engine.kept.release(request.id)


def test_the_activation_is_found_under_gemma_s_name(tmp_path: Path) -> None:
    """Catches gates computed with another activation than their config names."""
    for name in ("config.json", "trimkv_weights.pth"):
        (tmp_path / name).write_bytes((GOLDEN / "qwen3_rg" / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["hidden_act"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_activation": "gelu_pytorch_tanh"}))
    assert read_gates(tmp_path).hidden_act == "gelu_pytorch_tanh"
