"""Packed matrices: their forms and bytes, computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimkv_cli.model.gguf import GgufHeader, GgufTensor, TensorType, stored_packing
from trimkv_cli.model.packing import Tensors, form_of, packed_bytes, packs_int4, rows_at_once


def test_bytes_by_hand() -> None:
    """Catches scales that are counted for rows instead of groups, or zero points that are forgotten."""
    assert packed_bytes(16, 64, "int4") == 16 * 64 // 2 + 16 * 2 * 4
    assert packed_bytes(1536, 576, "int4") * 8 == 1536 * 576 * 5  # five bits a weight
    assert packed_bytes(10, 7, "int8") == 70 + 4 * 10


def test_int4_needs_whole_groups_and_tiles_of_outputs() -> None:
    """Catches a matrix that torch's product refuses when the model already is half loaded."""
    assert packs_int4(64, 32)
    assert not packs_int4(64, 48)
    assert not packs_int4(96, 32)


@pytest.mark.parametrize(
    ("type", "shape", "vocab", "form"),
    [
        ("Q4_0", (576, 576), False, "int4"),
        ("Q4_1", (192, 576), False, "int4"),
        ("Q4_K", (640, 2048), False, "int4"),
        ("Q4_1", (40, 576), False, "int8"),  # 40 outputs are no whole tiles
        ("Q5_0", (576, 576), False, "int8"),
        ("Q6_K", (576, 1536), False, "int8"),
        ("MXFP4", (576, 576), False, "int8"),
        ("Q4_1", (49152, 576), True, "int8"),
        ("F16", (49152, 576), True, "plain"),
        ("F32", (576, 576), False, "plain"),
        ("F32", (576,), False, "plain"),
        ("Q4_K", (8, 512, 256), False, "plain"),
    ],
)
def test_forms_of_block_types(type: str, shape: tuple[int, ...], vocab: bool, form: str) -> None:
    """Catches a block type that loses precision where it need not, and a head that the 4-bit product would blur."""
    assert form_of(type, shape, is_vocab=vocab) == form


def test_a_files_tensors_are_accounted_for() -> None:
    """Catches a head that counts as the embedding, and block types that nobody is told of."""
    q4, q8, f16, f32 = (
        TensorType(*kind) for kind in (("Q4_1", 32, 20), ("Q8_0", 32, 34), ("F16", 1, 2), ("F32", 1, 4))
    )
    kinds = {
        "output.weight": (f16, (1000, 64)),
        "token_embd.weight": (q8, (1000, 64)),
        "blk.0.attn_norm.weight": (f32, (64,)),
        "blk.0.attn_q.weight": (q4, (64, 64)),
        "blk.0.ffn_up.weight": (q8, (96, 64)),
        "blk.0.ffn_down.weight": (f16, (64, 96)),
    }
    tensors = {name: GgufTensor(path=Path(), offset=0, type=type, shape=shape) for name, (type, shape) in kinds.items()}
    packing = stored_packing(GgufHeader(path=Path(), metadata={}, tensors=tensors))
    assert packing.account == "int4: Q4_1 ×1; int8: Q8_0 ×2; plain: F32 ×1, F16 ×2"
    assert packing.bytes == 64 * 64 * 5 // 8 + 96 * 68 + 1000 * 68 + 64 * 4
    assert packing.numel == 64 * 64 + 96 * 64 + 1000 * 64
    assert packing.shapes == (("int4", 64, 64), ("int8", 96, 64))
    assert (packing.largest, packing.head, packing.unpacked) == (64 * 64, False, 1)
    assert packing.transit_bytes == 40 * 1000 * 64


def test_some_rows_are_in_transit_at_a_time() -> None:
    """Catches a budget that holds a vocabulary in float32, and parts of a large matrix that are joined uncounted."""
    assert rows_at_once(576) == 896
    assert rows_at_once(576, 192) % 192 == rows_at_once(1 << 20) % 64 == 0
    vocabulary = Tensors(label="Q8_0", shape=(49152, 576), form="int8", is_vocab=True)
    assert vocabulary.transit_bytes == 896 * 576 * 40
    wide = Tensors(label="matrices", shape=(65536, 4096), form="int4", count=3)
    assert wide.transit_bytes == 65536 * 4096 * 5 // 8 + 128 * 4096 * 28
