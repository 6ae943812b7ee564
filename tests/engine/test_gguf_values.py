"""Values in the blocks of a GGUF file, beside those of gguf-py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from trimkv_cli.errors import BrokenModel
from trimkv_cli.loading.gguf import GgufWeight
from trimkv_cli.model.gguf import GgufTensor, TensorType

_HALVES = {"Q8_0": [0], "Q5_0": [0], "Q6_K": [208], "Q5_K": [0, 2]}  # where numbers lie that must be finite


@pytest.mark.parametrize("kind", _HALVES)
def test_values_are_those_of_gguf_py(kind: str, tmp_path: Path) -> None:
    """Catches bits that are put together in another order, and a tensor that is read from another place."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (37, 2, size), dtype=np.uint8)
    for at in _HALVES[kind]:
        blocks[..., at : at + 2] = rng.normal(size=(37, 2, 1)).astype(np.float16).view(np.uint8)
    (tmp_path / "blocks").write_bytes(b"before" + blocks.tobytes())
    stored = GgufTensor(path=tmp_path / "blocks", offset=6, type=TensorType(kind, block, size), shape=(37, 2 * block))
    expected = dequantize(blocks.reshape(37, -1), GGMLQuantizationType[kind])
    assert np.array_equal(GgufWeight(stored, torch.float32)[...].numpy(), expected)


def test_a_tensor_that_is_cut_off(tmp_path: Path) -> None:
    """Catches weights of a file that shrank since its header was read."""
    (tmp_path / "blocks").write_bytes(bytes(34 * 63))
    stored = GgufTensor(path=tmp_path / "blocks", offset=0, type=TensorType("Q8_0", 32, 34), shape=(64, 32))
    with pytest.raises(BrokenModel, match="cut off"):
        GgufWeight(stored, torch.float32)[...]
