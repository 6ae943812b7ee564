"""The peak of memory since a chosen moment, where the system lets it be set back."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Begin a new peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5", encoding="ascii")  # sets the kernel's high-water mark to what is resident now


def row_peak_bytes(device: torch.device) -> int | None:
    """Return the peak since then, of the allocator on a GPU, else of the process; None where none can be read."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="ascii")) if _CLEAR.exists() else None
    return None if found is None else int(found[1]) * 1024
