"""What the process and the device have used at most, in bytes."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def peak_bytes(device: torch.device) -> int:
    """Return the peak of the allocator on a GPU, of the whole process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_rss()


def measured_peaks(device: torch.device) -> dict[str, int]:
    """Return the largest sizes so far: of the process, of a GPU's allocator, and what NVML sees of the process now."""
    peaks = {"rss_bytes": peak_rss()}
    if device.type == "cuda":
        peaks["allocator_bytes"] = torch.cuda.max_memory_allocated(device)
        peaks["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
        seen = nvml_bytes(device)
        peaks |= {} if seen is None else {"nvml_bytes": seen}
    return peaks


def nvml_bytes(device: torch.device) -> int | None:
    """Return the GPU memory that this process holds, as the driver counts it; None where it does not tell."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    return next((process.usedGpuMemory for process in running if process.pid == os.getpid()), None)


def cap_allocator(device: torch.device, allowed_bytes: int) -> None:
    """Make a GPU's allocator refuse what would take the process beyond its budget."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed_bytes / total), device)


@contextmanager
def tidy_heap() -> Iterator[None]:
    """Give each large tensor pages of its own while a model is loaded, and the heap's holes back afterwards.

    Tensors in transit between others that stay leave holes in glibc's heap: quantising an 88M model took 167 MiB more.
    """
    heap = _glibc()
    if heap is None:
        yield
        return
    heap.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        heap.malloc_trim(0)
        heap.mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # steps allocate the same sizes again and again: from the heap
        heap.mallopt(_M_TRIM_THRESHOLD, 1 << 27)


def _glibc() -> Any:
    """Return the C library where it is glibc, which can be told how to allocate."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "gnu_get_libc_version") else None


def give_back(device: torch.device) -> None:
    """Give memory that allocators keep, unused, back to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (heap := _glibc()) is not None:
        heap.malloc_trim(0)


def reset_peak(device: torch.device) -> None:
    """Begin a new peak, where the system lets it be set back."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        with suppress(OSError):
            _CLEAR.write_text("5", encoding="ascii")  # sets the kernel's high-water mark to what is resident now


def peak_rss() -> int:
    """Return the largest resident set of this process so far; where the system keeps no such count, the present one."""
    # Not what `resource` says on Linux: that counts the process from which this one was started as well.
    if _STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="ascii"))):
        return int(found[1]) * 1024
    now = psutil.Process().memory_info()
    try:
        import resource
    except ImportError:
        return int(getattr(now, "peak_wset", now.rss))  # Windows counts the first, others that lack the module nothing
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
