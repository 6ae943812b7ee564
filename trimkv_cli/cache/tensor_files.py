"""Files of named tensors, read without running what is in them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 - what torch.load raises when it refuses a file
from struct import error as StructError
from typing import Any
from warnings import catch_warnings

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trimkv_cli.errors import GateMismatch

AGAIN = "get the gate folder again"
MOST_NAMED = 8
# What torch.load has been seen to raise on damaged files.
_PICKLE_FAULTS = (
    UnpicklingError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, OverflowError,
    RuntimeError, StructError, TypeError, ValueError,
)  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        GateMismatch: it is none.
    """
    try:
        config = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (OSError, ValueError) as error:
        raise GateMismatch(f"cannot read {path}: {error}", hint=AGAIN) from None
    if not isinstance(config, dict):
        raise GateMismatch(f"{path} is not a JSON object", hint=AGAIN)
    return config


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        GateMismatch: it is damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise GateMismatch(f"cannot read {path}: {one_line(error)}", hint=AGAIN) from None


def read_pickle(path: Path, *, allowed: AbstractContextManager[object] | None = None) -> dict[str, Any]:
    """Read the dict that a file of `torch.save` holds; of other classes than tensors only those that are `allowed`.

    Raises:
        GateMismatch: it is damaged, would run code, or holds something else.
    """
    try:
        with catch_warnings(action="ignore"), allowed or nullcontext():  # torch's remarks on old and damaged files
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _PICKLE_FAULTS as error:
        raise _pickle_fault(path, error) from None
    if not isinstance(content, dict):
        raise GateMismatch(f"{path} holds a {type(content).__name__}, not named tensors", hint=AGAIN)
    return {str(key): value for key, value in content.items()}


def named_tensors(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Return what was read as tensors.

    Raises:
        GateMismatch: some of it is none.
    """
    others = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise GateMismatch(f"{path} holds more than tensors: {listed(others)}", hint=AGAIN)
    return {key: tensor.detach() for key, tensor in content.items()}


def _pickle_fault(path: Path, error: Exception) -> GateMismatch:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return GateMismatch(
            f"refuses to run code from {path}: it calls {code[1]}",
            hint="gates are plain tensors; do not trust this file",
        )
    return GateMismatch(f"cannot read {path}: {one_line(error)}", hint=AGAIN)


def one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(names: Sequence[str]) -> str:
    """Join the first names, and count the others."""
    more = f", +{len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
