"""Choice of the operations' implementation, once per device."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimkv_kernels import reference
from trimkv_kernels.slots import LayerTable


class Operations(NamedTuple):
    """The operations of one device; `reference` says what they do, and `LayerTable` what those of all layers do."""

    decode: Callable[..., Tensor]
    prefill: Callable[..., Tensor]
    undo: Callable[[LayerTable, Tensor], None] = LayerTable.undo
    clear: Callable[[LayerTable, int], None] = LayerTable.clear


class StepOperations(NamedTuple):
    """The operations of a whole decode step between its matrix products; `step_reference` says what they do."""

    add_norm: Callable[..., Tensor]
    rotate: Callable[..., Tensor]
    attend: Callable[..., Tensor]
    activate: Callable[..., Tensor]
    evict: Callable[..., None]

    @classmethod
    def of(cls, module: Any) -> StepOperations:
        """Take those of `step_reference`, or of `step`."""
        return cls(*(getattr(module, name) for name in cls._fields))


class Obstacle(NamedTuple):
    """What keeps Triton from running, and what may help."""

    what: str
    remedy: str


def operations_for(device: torch.device) -> Operations:
    """Return the Triton operations on a CUDA device on which Triton runs, elsewhere the reference."""
    if device.type != "cuda" or triton_obstacle(device) is not None:
        return Operations(reference.decode, reference.prefill)
    from trimkv_kernels.decode import decode
    from trimkv_kernels.prefill import prefill
    from trimkv_kernels.rows import clear, undo

    return Operations(decode, prefill, undo, clear)


def step_operations_for(device: torch.device) -> StepOperations | None:
    """Return the Triton operations of a step on a CUDA device on which Triton runs, elsewhere none."""
    if device.type != "cuda" or triton_obstacle(device) is not None:
        return None
    from trimkv_kernels import step

    return StepOperations.of(step)


@cache
def triton_obstacle(device: torch.device) -> Obstacle | None:
    """Run a trivial kernel, once per device; return what keeps Triton from it, if anything."""
    try:
        from trimkv_kernels.trial import run_trial

        with torch.cuda.device(device):
            run_trial(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001  each release and each missing part fails in its own way
        return _obstacle(error)
    return None


def _obstacle(error: Exception) -> Obstacle:
    """Say what is missing: Triton builds what launches its kernels in C, against Python's headers."""
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "triton":
        return Obstacle("triton is not installed", "pip install triton, where there is one for this system")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return Obstacle("triton finds no C compiler", "apt-get install gcc")
    header = Path(sysconfig.get_config_var("INCLUDEPY") or "") / "Python.h"
    if not header.is_file():
        return Obstacle(f"triton finds no {header}", "apt-get install python3-dev")
    said = str(error).splitlines() or [""]
    return Obstacle(f"triton fails: {type(error).__name__}: {said[0]}", "pip install --force-reinstall triton")
