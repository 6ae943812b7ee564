"""The peak of memory since a chosen moment, where the system lets it be set back."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def row_peak_bytes(device: torch.device) -> int | None:
    """Return the peak since its reset, of the allocator on a GPU, else of the process; None where none can be read."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="ascii")) if _CLEAR.exists() else None
    return None if found is None else int(found[1]) * 1024
