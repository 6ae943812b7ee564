"""A tiny model to train gates for, with batches and folders of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimkv_cli.mini import MODEL_FOLDER
from trimkv_cli.model.spec import ModelSpec
from trimkv_cli.train.options import TrainOptions
from trimkv_cli.train.packing import Batch, watch
from trimkv_cli.train.trainer import Trainer, describe_gates, new_gates
from trimkv_cli.train.training_pass import TrainingPass

OPTIONS: dict[str, Any] = {"memory_size": 4, "context": 24, "steps": 4, "hidden": 8, "bias_init": 2.0, "lr": 1e-2}


def make_trainer(model: Any, *, teacher: Any = None, recompute_layers: bool = False, **changes: Any) -> Trainer:
    spec = ModelSpec.from_config(model.config.to_dict())
    options = TrainOptions(**{**OPTIONS, **changes})
    gate = describe_gates(options, spec, "tiny")
    gates = new_gates(gate, spec, options, hidden_act="silu", device=torch.device("cpu"))
    return Trainer(model, gates, spec, options, teacher=teacher, recompute_layers=recompute_layers)


def make_batch(rows: int = 2, length: int = 24, *, seed: int = 0) -> Batch:
    """Two documents in a row, the second with a jump in its positions, then padding."""
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(3, 128, size=(rows, length)))
    split, end = length // 3, length - 2
    documents = torch.full((rows, length), -1)
    documents[:, :split], documents[:, split:end] = 0, 1
    positions = torch.arange(length).repeat(rows, 1)
    positions[:, split:] -= split
    positions[:, length // 2 :] += 50
    wanted = torch.from_numpy(rng.random((rows, length)) < 0.5) & (documents >= 0)
    wanted[:, [0, split]] = False
    watched = np.stack([watch(*row, rng) for row in zip(wanted.numpy(), documents.numpy(), strict=True)])
    return Batch(ids, wanted, positions, documents, torch.from_numpy(watched))


def attend_one_by_one(
    query: Any, key: Any, value: Any, now: TrainingPass, see: Callable[[int, int, dict[int, int]], dict[int, Any]]
) -> Any:
    """Attend one query at a time: `[B, Hq, T, D]`; query head h belongs to KV head h // groups.

    `see` gets a row, a KV head and the ages of the tokens so far of the query's document, and returns those that are
    seen, each with what is added to its logit.
    """
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    output = torch.zeros(batch, heads, length, value.shape[3])
    for b, h, t in product(range(batch), range(heads), range(length)):
        before = [i for i in range(t + 1) if now.documents[b, i] == now.documents[b, t]]
        seen = see(b, h // groups, {i: int(now.positions[b, t] - now.positions[b, i]) for i in before})
        logits = torch.stack([key[b, h // groups, i] @ query[b, h, t] + bias for i, bias in seen.items()])
        output[b, h, t] = torch.softmax(logits, 0) @ value[b, h // groups, list(seen)]
    return output


def save_tiny_model(folder: Path, tiny_model: Callable[..., Any]) -> Path:
    """Save a small random model with the tokenizer of the built-in one."""
    vocab_size = json.loads((MODEL_FOLDER / "config.json").read_text())["vocab_size"]
    tiny_model("qwen3", vocab_size=vocab_size).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((MODEL_FOLDER / name).read_bytes())
    return folder


def write_conversations(path: Path, count: int = 12) -> Path:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"the code of box {number} is {number * 37}"},
                {"role": "assistant", "content": "ok"},
                {"role": "user", "content": f"which code has box {number}?"},
                {"role": "assistant", "content": f"{number * 37}"},
            ]
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
