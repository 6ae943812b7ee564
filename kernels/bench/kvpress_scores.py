"""Scores of gates that others made, by our loaders and by kvpress, from files that kvpress's own classes write.

build/kvpress/bin/python kernels/bench/kvpress_scores.py write build/scores
.venv/bin/python -m bench.kvpress_scores compare build/scores --out kernels/bench/results/kvpress-scores.json

The first half runs in kvpress's environment (`kvpress_answers.py` says how to make it) and imports nothing of trimkv: a
tiny Qwen3 of random weights, a KVzap folder of either kind and a file of Fast KVzip, found by name without a network,
and what `KVzapPress` and `FastKVzipPress` score in each layer of a prefill. The second loads the same files and scores
the same hidden states. Tokens that Fast KVzip protects are left out: their score is 1 whatever the gate says.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

_TOKENS, _SINKS, _WINDOW = 300, 4, 6  # Fast KVzip protects four first tokens and 2 % of them at the end
_NAME = "tiny"
_KINDS = ("mlp", "linear", "fastkvzip")
_SHAPE = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
_VOCABULARY = 256
_MODEL = {"vocab_size": _VOCABULARY, "intermediate_size": 128, "head_dim": 16, "initializer_range": 0.2, **_SHAPE}
_HUB = Path("hub/models--Jang-Hyun--Fast-KVzip")
_SNAPSHOT = _HUB / "snapshots" / ("0" * 40) / _NAME
_FAST = _SNAPSHOT / "q3_dim16_sink16.pt"


def gates_of(kind: str) -> Path:
    """Return where kvpress looks for gates of a kind, in the folder where it runs."""
    return _FAST if kind == "fastkvzip" else Path(f"nvidia/KVzap-{kind}-{_NAME}")


def write(folder: Path) -> None:
    """Write model, gates, hidden states and kvpress's scores of them, in kvpress's environment."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(Path("hub").resolve())}

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(7)
    Qwen3ForCausalLM(Qwen3Config(**_MODEL)).save_pretrained(_NAME)
    _write_gates()
    model = AutoModelForCausalLM.from_pretrained(_NAME, dtype=torch.float32).eval()
    ids = torch.randint(0, _VOCABULARY, (1, _TOKENS))
    with torch.inference_mode():
        tensors = {
            f"{kind}.{index}": scores for kind in _KINDS for index, scores in enumerate(_scores(kind, model, ids))
        }
        tensors |= {f"hidden.{index}": states for index, states in enumerate(_hidden_states(model, ids))}
    used = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, "scores.safetensors", used)


def _write_gates() -> None:
    """Write random gates as those of kvpress's classes are written."""
    import torch
    from kvpress.presses.fastkvzip_press import FastKVzipGate
    from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel

    hidden, heads, layers = _SHAPE["hidden_size"], _SHAPE["num_key_value_heads"], _SHAPE["num_hidden_layers"]
    groups = _SHAPE["num_attention_heads"] // heads
    for kind, wide in (("mlp", 48), ("linear", None)):
        config = KVzapConfig(input_dim=hidden, output_dim=heads, n_modules=layers, hidden_dim=wide)
        KVzapModel(config).save_pretrained(gates_of(kind))
    gates = [FastKVzipGate(index, hidden, heads, groups, torch.float32) for index in range(layers)]
    for gate in gates:
        for parameter in gate.parameters():
            torch.nn.init.normal_(parameter)
    _SNAPSHOT.mkdir(parents=True, exist_ok=True)
    (_HUB / "refs").mkdir(exist_ok=True)
    (_HUB / "refs/main").write_text("0" * 40)
    torch.save({"module": [gate.state_dict() for gate in gates]}, _FAST)


def _scores(kind: str, model: Any, ids: Any) -> list[Any]:
    """Return what a press scores in each layer, `[1, Hkv, T]`."""
    from kvpress import FastKVzipPress, KVzapPress

    if kind == "fastkvzip":
        press = FastKVzipPress()
        with press(model):
            model.model(ids)
        return list(press.score_val)
    found: list[Any] = []
    press = KVzapPress(compression_ratio=0.5, model_type=kind)
    score = press.score

    def heard(*given: Any) -> Any:
        found.append(score(*given))
        return found[-1]

    press.score = heard
    with press(model):
        model.model(ids)
    return found


def _hidden_states(model: Any, ids: Any) -> list[Any]:
    """Return what enters each layer's attention, `[1, T, hidden]`."""
    found: list[Any] = []

    def hear(_module: Any, _given: Any, named: dict[str, Any]) -> None:
        found.append(named["hidden_states"])

    hooks = [layer.self_attn.register_forward_pre_hook(hear, with_kwargs=True) for layer in model.model.layers]
    model.model(ids)
    for hook in hooks:
        hook.remove()
    return found


def compare(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield, for each kind of gates, how far our scores are from kvpress's, in trimkv's environment."""
    import torch
    from safetensors.torch import load_file

    from trimkv_cli.cache.gate_files import check_gates, read_gates
    from trimkv_cli.cache.gates import build_gates
    from trimkv_cli.model.folders import read_model_spec

    spec, tensors = read_model_spec(folder / _NAME), load_file(folder / "scores.safetensors")
    positions = torch.arange(_TOKENS)[None]
    for kind in _KINDS:
        gate, weights, _, _ = read_gates(folder / gates_of(kind))
        check_gates(spec, gate, weights)
        modules = build_gates(gate, spec, weights, dtype=torch.float32, device="cpu")
        ours = [module(tensors[f"hidden.{index}"], positions) for index, module in enumerate(modules)]
        theirs = [tensors[f"{kind}.{index}"].transpose(1, 2) for index in range(len(ours))]
        own = slice(_SINKS, _TOKENS - _WINDOW) if kind == "fastkvzip" else slice(None)
        pairs = [(one[:, own], other[:, own]) for one, other in zip(ours, theirs, strict=True)]
        yield {
            "gates": kind,
            "variant": gate.variant,
            "scores": sum(one.numel() for one, _ in pairs),
            "largest_difference": max(float((one - other).abs().max()) for one, other in pairs),
            "range": [min(float(one.min()) for _, one in pairs), max(float(one.max()) for _, one in pairs)],
        }


def _record(folder: Path, out: Path | None) -> None:
    from safetensors import safe_open

    from bench.record import write_record

    with safe_open(folder / "scores.safetensors", "pt") as file:
        used = file.metadata()
    rows = list(compare(folder))
    for row in rows:
        print(json.dumps(row), file=sys.stderr)
    write_record("bench.kvpress_scores", {"kvpress_environment": used, "rows": rows}, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("half", choices=("write", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    asked = parser.parse_args()
    if asked.half == "write":
        write(asked.folder)
    else:
        _record(asked.folder, asked.out)


if __name__ == "__main__":
    main()
