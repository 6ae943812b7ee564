"""Random blocks for measurements against the package `gguf`, which knows what they mean."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

from bench.random_gguf import SHAPES, random_values


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q6_K, Type.Q5_0, Type.Q8_0])
def test_random_blocks_are_weights_of_one_size(kind: Type) -> None:
    """Catches a scale or its bits in the wrong place of a block: activations of many layers then overflow."""
    weights = dequantize(random_values((256, 1024), kind, np.random.default_rng(0)), kind)
    assert weights.shape == (256, 1024)
    assert abs(weights.mean()) < 0.0005
    assert weights.std() == pytest.approx(0.02, rel=0.1)
    deviations = weights.reshape(-1, 16).std(axis=1)
    assert deviations.min() / deviations.mean() > 0.1


def test_types_are_those_of_q4_k_m() -> None:
    """Catches layers that get other types than llama.cpp gives them: half of two matrices, in widths of 256."""
    kinds = Counter(kind.name for _, _, kind in SHAPES["llama-3.2-1b"].tensors())
    assert kinds == {"Q4_K": 16 * 7 - 16, "Q6_K": 17, "F32": 33}
    small = Counter(kind.name for _, _, kind in SHAPES["smollm2-135m"].tensors())
    assert set(small) == {"Q5_0", "Q8_0", "Q4_K", "Q6_K", "F32"}
