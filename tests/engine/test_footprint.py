"""Every byte that is allocated against the plan, for all families and precisions."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils.logging import disable_progress_bar

from trimkv_cli.bench.memory import MODELS, PRECISIONS, measure, save_model


@pytest.mark.parametrize("name", [name for name in MODELS if "tiny" in name])
def test_what_is_allocated_is_what_was_planned(name: str, tmp_path: Path) -> None:
    """Catches a tensor that the plan forgot or counts twice: weights, gates, cache and the peak of a step, to 2 %."""
    disable_progress_bar()
    folder = save_model(MODELS[name], tmp_path / "model")
    for dtype, quantize in PRECISIONS:
        made = measure(folder, dtype=dtype, quantize=quantize, rows=3, kv_budget=40, chunk=64)
        assert 0.98 <= made["planned_over_measured"] <= 1.02, made
