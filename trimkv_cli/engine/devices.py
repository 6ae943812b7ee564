"""Which device runs the model, how much memory it has, and how a CPU computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from trimkv_cli.errors import UsageError
from trimkv_cli.machine import memory_bytes, swappable_bytes


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
            raise UsageError(f"there is no {device} here", hint="--device cpu, or trimkv doctor")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("there is no mps device here", hint="--device cpu, or trimkv doctor")
    elif device.type not in ("cpu", "mps"):
        raise UsageError(f"{name!r} is not a device that trimkv runs on", hint="auto, cpu, cuda, cuda:1 or mps")
    return device


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

    AVX-512 has instructions for bf16, too, but torch's products take twice as long with these as in float32.
    """
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(able.get(name) for name in ("amx_bf16", "bf16"))


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


def settle(threads: int | None) -> None:
    """Have this thread train on so many from now on, and take for 0 what is less than 1e-38.

    Such numbers are weights of what was evicted long ago; a CPU takes up to 160 times as long for a product of them.
    """
    torch.set_flush_denormal(True)
    if threads:
        torch.set_num_threads(threads)
