"""Engines under gates that others made: what the first layer keeps is what plain loops rank highest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.engines import greedy, run
from helpers.other_gates import Layers, fastkvzip_score, kvzap_score, write_fastkvzip, write_kvzap
from trimkv_cli.errors import GateMismatch
from trimkv_cli.loading import loader
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.model.folders import read_model_spec

TinyModel = Callable[..., Any]
PROMPT = tuple(range(3, 60))
SLOTS = 16


def write(kind: str, model: Path, gates: Path) -> Layers:
    spec = read_model_spec(model)
    if kind == "fastkvzip":
        return write_fastkvzip(gates, spec)
    return write_kvzap(gates, spec, hidden=24 if kind == "mlp" else None)


@pytest.mark.parametrize(
    ("kind", "family", "chunk"),
    [
        ("mlp", "qwen3", 7),
        ("linear", "phi3", 512),
        ("fastkvzip", "qwen3", 0),
        ("fastkvzip", "llama", 7),
    ],
)
def test_the_first_layer_keeps_the_highest_scores(
    kind: str, family: str, chunk: int, tmp_path: Path, tiny_model: TinyModel
) -> None:
    """Catches scores that fade with age, and gates that are given something else than what enters attention.

    No token of the first layer sees another, so that its inputs are known, and a static score that lost once has lost.
    """
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    layers = write(kind, tmp_path / "model", tmp_path / "gates")
    asked = {"model": str(tmp_path / "model"), "gates": str(tmp_path / "gates"), "kv_budget": str(SLOTS)}
    engine = load_engine(EngineOptions(**asked, prefill_chunk=chunk, max_inflight=2, threads=1, pin="none"))
    output = run(engine, [greedy("a", PROMPT, 20, keep=True), greedy("b", PROMPT[:9], 20)])
    ids = torch.tensor([*PROMPT, *output["a"][:-1]])
    with torch.inference_mode():
        first = model.model.layers[0]
        states = first.input_layernorm(model.model.embed_tokens(ids))
    scores = torch.tensor((fastkvzip_score if kind == "fastkvzip" else kvzap_score)(layers[0], states))
    for head, kept in enumerate(engine.kept.positions("a")[0]):
        best = scores[:, head].sort().values[-SLOTS:]  # not their positions: a token that comes twice has one score
        torch.testing.assert_close(scores[kept, head].sort().values, best)
    for layer in engine.kept.retained("a").layers:
        assert layer.static


@pytest.mark.parametrize("wrong", ["layers", "file"])
def test_misfits_are_refused_before_weights_are_read(
    wrong: str, tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches gigabytes that are read before a small file shows that they are in vain."""
    tiny_model("qwen3").save_pretrained(tmp_path / "model")
    spec = read_model_spec(tmp_path / "model")
    write_fastkvzip(tmp_path / "gates", spec, count=2 if wrong == "layers" else None)
    if wrong == "file":
        (tmp_path / "gates/q2_dim16_sink16.pt").write_bytes(b"PK")
    monkeypatch.setattr(loader, "load_model", None)
    with pytest.raises(GateMismatch):
        load_engine(EngineOptions(model=str(tmp_path / "model"), gates=str(tmp_path / "gates")))
