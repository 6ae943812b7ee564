"""Where a training run stands, in one file that is there whole or not at all."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.files import whole_file, writing
from trimkv_cli.train.packing import Cursor
from trimkv_cli.train.trainer import Losses, Trainer

FILE_NAME = "training.safetensors"
FORMAT_VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")
RECENT_STEPS = 20


@dataclass(slots=True, kw_only=True)
class Progress:
    """What a run carries from step to step beside tensors."""

    cursor: Cursor = field(default_factory=Cursor)
    recent: deque[Losses] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def mean_losses(self) -> dict[str, float]:
        """Return the means of the last steps' losses, of those that were computed."""
        if not self.recent:
            return {}
        rows = [asdict(losses) for losses in self.recent]
        computed = [name for name, value in rows[0].items() if value is not None]
        return {name: sum(row[name] for row in rows) / len(rows) for name in computed}


def save_checkpoint(folder: Path, trainer: Trainer, progress: Progress, identity: Mapping[str, Any]) -> None:
    """Write the run's state; an earlier one stays until the new one is safe on the disk.

    Raises:
        UsageError: the folder cannot be written.
        TrimkvError: the disk is full.
    """
    state = {
        "format_version": FORMAT_VERSION,
        "steps_done": trainer.steps_done,
        "cursor": asdict(progress.cursor),
        "recent": [asdict(losses) for losses in progress.recent],
        "identity": dict(identity),
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / FILE_NAME) as partial:
        save_file(_tensors(trainer), partial, metadata={"trimkv": json.dumps(state)})


def load_checkpoint(folder: Path, trainer: Trainer, identity: Mapping[str, Any]) -> Progress | None:
    """Put a run's state into `trainer`; None when there is none to go on from.

    Raises:
        UsageError: the checkpoint is another run's; the fields that differ are named.
        InputError: the file is damaged.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["trimkv"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        _check_identity(path, state["identity"], identity)
        _restore(trainer, tensors, int(state["steps_done"]))
        recent = (Losses(**losses) for losses in state["recent"])
        return Progress(cursor=Cursor(**state["cursor"]), recent=deque(recent, maxlen=RECENT_STEPS))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        hint = "--overwrite trains from the start"
        raise InputError(f"{path} cannot be read: {type(error).__name__}: {error}", hint=hint) from error


def _check_identity(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(wanted))
    differing = [name for name in {**saved, **plain} if saved.get(name) != plain.get(name)]
    if differing:
        changes = "; ".join(f"{name} was {_shown(saved, name)}, now {_shown(plain, name)}" for name in differing)
        raise UsageError(f"{path} is of another run: {changes}", hint="another -o, or --overwrite to start anew")


def _shown(values: Mapping[str, Any], name: str) -> str:
    text = str(values.get(name, "not set"))
    return text if len(text) <= 40 else f"{text[:12]}…"


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in trainer.parameters.items():
        state = trainer.optimizer.state[parameter]
        tensors[name] = parameter.detach().cpu().contiguous()
        tensors |= {f"{moment}.{name}": state[moment].cpu().contiguous() for moment in MOMENTS if moment in state}
    return tensors


def _restore(trainer: Trainer, tensors: Mapping[str, Tensor], steps_done: int) -> None:
    trainer.steps_done = steps_done
    for name, parameter in trainer.parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[name])
        moments = {m: tensors[f"{m}.{name}"].to(parameter.device) for m in MOMENTS if f"{m}.{name}" in tensors}
        if moments:
            trainer.optimizer.state[parameter] = {"step": torch.tensor(float(steps_done)), **moments}
