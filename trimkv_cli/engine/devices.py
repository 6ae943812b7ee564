"""Devices, their memory, and how a CPU computes."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from trimkv_cli.errors import UsageError
from trimkv_cli.model.machine import memory_bytes, swappable_bytes


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; auto is the first GPU, else the CPU.

    Raises:
        UsageError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is not a device", hint="auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        if not torch.cuda.is_available() or device.index >= torch.cuda.device_count():
            raise UsageError(f"there is no {device} here: {_gpus_here()}", hint="--device cpu, or trimkv doctor")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("there is no mps device here", hint="--device cpu, or trimkv doctor")
    elif device.type not in ("cpu", "mps"):
        raise UsageError(f"{name!r} is not a device that trimkv runs on", hint="auto, cpu, cuda, cuda:1 or mps")
    return device


def _gpus_here() -> str:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    named = (f"cuda:{index}, {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count()))
    return f"there is {'; '.join(named)}"


def take_device(name: str) -> torch.device:
    """Return the device called `name`, on which this process computes from now on.

    Triton, streams and graphs go to the process's current GPU, wherever their tensors lie.

    Raises:
        UsageError: no such device here, or this process uses another GPU.
    """
    device = pick_device(name)
    if device.type != "cuda":
        return device
    others = (index for index in range(torch.cuda.device_count()) if index != device.index)
    used = next((index for index in others if torch.cuda.memory_allocated(index)), None)
    if used is not None:
        raise UsageError(
            f"this process uses cuda:{used} already, and one process runs on one GPU",
            hint=f"start another process for {device}",
        )
    torch.cuda.set_device(device)
    return device


def device_bytes(device: torch.device) -> int:
    """Return all memory of a GPU, or of the machine: what this process may use of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_bytes()[0]


def cuda_capability(device: torch.device) -> tuple[int, int]:
    """Return major and minor of what a GPU can do."""
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free now, on a GPU with what torch keeps of it unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return memory_bytes()[1]


def swap_bytes(device: torch.device) -> int:
    """Return how much more than is free a process can get of the system, slowly."""
    return 0 if device.type == "cuda" else swappable_bytes()


@cache
def multiplies_bf16() -> bool:
    """Say whether the CPU multiplies matrices of bf16 faster than of float32: with tiles, or on ARM.

    With AVX-512 alone products of weights kept in bf16 are faster, too, but not those of a backward pass.
    """
    return _able_to("amx_bf16", "bf16")


@cache
def reads_bf16() -> bool:
    """Say whether the CPU multiplies activations by weights kept in bf16 faster than in float32."""
    return multiplies_bf16() or _able_to("avx512_bf16")


def _able_to(*names: str) -> bool:
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(able.get(name) for name in names)


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Run torch on so many threads; None = as many as before."""
    before = torch.get_num_threads()
    if count in (None, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare_training(threads: int | None) -> None:
    """Have this thread train on so many from now on, and take for 0 what is less than 1e-38.

    Such numbers are weights of what was evicted long ago; a CPU takes up to 160 times as long for a product of them.
    """
    torch.set_flush_denormal(True)
    if threads:
        torch.set_num_threads(threads)


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


def wait_for(device: torch.device) -> None:
    """Return when a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
        yield from stored_parts(parameter)
        for state in (vars(parameter), _fields(getattr(parameter, "quant_state", None))):
            yield from (value for value in state.values() if isinstance(value, Tensor))
    for part in module.modules():
        yield from (value for value in _fields(getattr(part, "state", None)).values() if isinstance(value, Tensor))


def stored_parts(parameter: Tensor) -> list[Tensor]:
    """Return what a weight consists of, as torchao's do of values and scales."""
    flatten = getattr(parameter, "__tensor_flatten__", None)
    return [parameter] if flatten is None else [getattr(parameter, name) for name in flatten()[0]]


def _fields(state: object) -> dict[str, object]:
    """Return the fields of bitsandbytes' own records, one nested level included."""
    fields = dict(getattr(state, "__dict__", {}))
    nested = getattr(fields.get("state2"), "__dict__", {})
    return {**fields, **{f"nested.{name}": value for name, value in nested.items()}}
