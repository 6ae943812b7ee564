"""Gates of all layers as one, beside one after the other."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from bench.step_kernels import recorded
from trimkv_cli.cache.gates import MlpGate, SwigluGate
from trimkv_cli.cache.other_gates import FastKVzipGate, KVzapGate
from trimkv_cli.engine.together import GatesTogether

pytest.importorskip("triton", reason="triton has no wheel for this platform")

LAYERS, ROWS, INPUT, HEADS = 3, 2, 20, 2
SHAPE: dict[str, Any] = {"input_size": INPUT, "hidden": 12, "num_kv_heads": HEADS, "activation": torch.nn.SiLU()}
KINDS: dict[str, Any] = {
    "rg": lambda: MlpGate(variant="rg", **SHAPE),
    "rg10": lambda: MlpGate(variant="rg10", **SHAPE),
    "rg3": lambda: SwigluGate(**SHAPE),
    "kvzap": lambda: KVzapGate(input_size=INPUT, hidden=12, num_kv_heads=HEADS),
    "kvzap of one layer": lambda: KVzapGate(input_size=INPUT, hidden=0, num_kv_heads=HEADS),
    "fastkvzip": lambda: FastKVzipGate(input_size=INPUT, num_heads=2 * HEADS, num_kv_heads=HEADS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gates_at_once_score_as_one_after_the_other(kind: str) -> None:
    """Catches gates of another layer, a dimension taken for another, and operations that every layer has again."""
    torch.manual_seed(0)
    counts = []
    for layers in (LAYERS, 2 * LAYERS):
        gates = [KINDS[kind]().requires_grad_(requires_grad=False) for _ in range(layers)]
        for parameter in torch.nn.ModuleList(gates).parameters():
            torch.nn.init.normal_(parameter)
        hidden, position = torch.randn(layers, ROWS, INPUT), torch.tensor([5, -1], dtype=torch.int32)
        want = torch.stack([gate(x[:, None], position[:, None])[:, 0] for gate, x in zip(gates, hidden, strict=True)])
        with ExitStack() as undo:
            together = GatesTogether(gates, undo, at_once=True)
            with torch.inference_mode():
                torch.testing.assert_close(together(hidden, position), want, atol=1e-5, rtol=1e-5)
                if kind != "rg":
                    with recorded() as names:
                        together(hidden, position)
                    counts.append(len(names))
        alone = torch.stack([gate(x[:, None], position[:, None])[:, 0] for gate, x in zip(gates, hidden, strict=True)])
        assert torch.equal(alone, want)
    assert len(set(counts)) <= 1
