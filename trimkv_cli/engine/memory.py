"""What the process and the device have used at most, in bytes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import psutil
import torch
from torch import Tensor, nn


def peak_bytes(device: torch.device) -> int:
    """Return the peak of the allocator on a GPU, of the whole process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_rss()


def peak_rss() -> int:
    """Return the largest resident set of this process so far; where the system keeps no such count, the present one."""
    if sys.platform == "win32":
        return int(psutil.Process(os.getpid()).memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def module_bytes(module: nn.Module) -> int:
    """Count the bytes of parameters, buffers and quantisation state, shared ones once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in _tensors(module) if tensor.numel()}
    return sum(tensors.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.buffers()
    for parameter in module.parameters():
        yield parameter
        for state in (vars(parameter), _fields(getattr(parameter, "quant_state", None))):
            yield from (value for value in state.values() if isinstance(value, Tensor))
    for part in module.modules():
        yield from (value for value in _fields(getattr(part, "state", None)).values() if isinstance(value, Tensor))


def _fields(state: object) -> dict[str, object]:
    """Return the fields of bitsandbytes' own records, one nested level included."""
    fields = dict(getattr(state, "__dict__", {}))
    nested = getattr(fields.get("state2"), "__dict__", {})
    return {**fields, **{f"nested.{name}": value for name, value in nested.items()}}
