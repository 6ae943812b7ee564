"""GPUs as NVIDIA's driver knows them, asked without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU that a process may use: its memory, all and free, and its compute capability."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]


def has_driver() -> bool:
    """Say whether an NVIDIA driver is loaded, on Linux or under it on Windows."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def gpus_here() -> list[Gpu]:
    """Return the GPUs that `CUDA_VISIBLE_DEVICES` leaves, in its order; none where no driver can be asked.

    Without that variable they are in the order of their slots, which is torch's where they are all of one kind.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        return [_ask(pynvml, handle) for handle in _handles(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))]
    except (ImportError, OSError):
        return []
    except pynvml.NVMLError:
        return []


def _handles(pynvml: Any, visible: str | None) -> Iterator[Any]:
    """Return handles of the visible ones; as CUDA does, those after a name that says nothing are not."""
    count = pynvml.nvmlDeviceGetCount()
    for name in map(str, range(count)) if visible is None else map(str.strip, visible.split(",")):
        if name.isdigit() and int(name) < count:
            yield pynvml.nvmlDeviceGetHandleByIndex(int(name))
        elif name.startswith("GPU-"):
            yield pynvml.nvmlDeviceGetHandleByUUID(name)
        else:
            return


def _ask(pynvml: Any, handle: Any) -> Gpu:
    memory, name = pynvml.nvmlDeviceGetMemoryInfo(handle), pynvml.nvmlDeviceGetName(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        name=name.decode() if isinstance(name, bytes) else str(name),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        capability=(int(major), int(minor)),
    )
