"""What the process and the device have used at most, in bytes."""

from __future__ import annotations

import os
import sys

import psutil
import torch


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
