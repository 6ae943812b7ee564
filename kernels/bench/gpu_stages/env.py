"""Stage 0: what this machine is, whether Triton runs on it, and how fast it copies and multiplies."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import trimkv_cli
import trimkv_kernels
from bench.gpu_stages.stage import Check, Evidence, Setting, wait_for
from trimkv_kernels import triton_obstacle

ROOT = Path(__file__).parents[3]
_PACKAGES = ("torch", "transformers", "triton", "tokenizers", "typer", "orjson", "bitsandbytes", "nvidia-ml-py")


def versions(_: Setting) -> Iterator[Evidence]:
    """Say what is installed here, and that it is this tree's trimkv that is run."""
    found = {name: _version(name) for name in _PACKAGES}
    about = {"python": platform.python_version(), "machine": platform.machine(), "cuda": torch.version.cuda}
    own = all(Path(package.__file__ or "").is_relative_to(ROOT) for package in (trimkv_cli, trimkv_kernels))
    yield Evidence(check="versions", ok=own, facts={"this_tree": own, **about, **found})


def device(setting: Setting) -> Iterator[Evidence]:
    """Find the GPU, and say what its driver says of it."""
    if not setting.on_gpu:
        yield Evidence(check="device", ok=True, facts={"threads": torch.get_num_threads()})
        return
    found = torch.cuda.get_device_properties(setting.device)
    facts: dict[str, Any] = {"name": found.name, "bytes": found.total_memory, "sm": f"{found.major}.{found.minor}"}
    yield Evidence(check="device", ok=True, facts={**facts, "nvidia_smi": _nvidia_smi()})


def triton_runs(setting: Setting) -> Iterator[Evidence]:
    """Compile and launch a trivial kernel; a CPU gets the operations of torch."""
    obstacle = triton_obstacle(setting.device) if setting.on_gpu else None
    facts = {"compiler": shutil.which("gcc") or shutil.which("clang"), "obstacle": obstacle and obstacle.what}
    yield Evidence(
        check="triton runs" if setting.on_gpu else "torch's operations run", ok=obstacle is None, facts=facts
    )


def copies(setting: Setting) -> Iterator[Evidence]:
    """Measure how fast this device copies."""
    yield Evidence(check="copy bandwidth", ok=True, facts={"bytes_per_s": copy_bandwidth(setting)})


def copy_bandwidth(setting: Setting) -> float:
    """Return the bytes per second of a copy, read and written bytes counted."""
    size = 2**24 if setting.tiny else 2**33
    if setting.on_gpu:
        size = min(size, torch.cuda.mem_get_info(setting.device)[0] // 4)
    source, target = (torch.zeros(size, dtype=torch.int8, device=setting.device) for _ in range(2))
    times, seconds = _repeat(lambda: target.copy_(source), setting, least_s=0.2)
    return 2 * size * times / seconds


def multiplies(setting: Setting) -> Iterator[Evidence]:
    """Multiply square matrices of bf16 for a second, which raises a GPU's clocks, too."""
    size = 256 if setting.tiny else 8192
    one = torch.full((size, size), 2.0**-6, dtype=torch.bfloat16, device=setting.device)
    times, seconds = _repeat(lambda: one @ one, setting, least_s=0.1 if setting.tiny else 1.0)
    right = bool((one @ one == size * 2.0**-12).all())
    facts = {"flop_per_s": 2 * size**3 * times / seconds, "size": size}
    yield Evidence(check="bf16 products", ok=right, facts=facts)


def _repeat(step: Callable[[], Any], setting: Setting, *, least_s: float) -> tuple[int, float]:
    """Return how often `step` ran in how many seconds, at least `least_s`, after one run that does not count."""
    step()
    wait_for(setting.device)
    started, times = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < least_s:
        step()
        wait_for(setting.device)
        times += 1
    return times, seconds


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _nvidia_smi() -> str | None:
    """Return the driver, clocks and power as nvidia-smi has them, where there is one."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


CHECKS: tuple[Check, ...] = (versions, device, triton_runs, copies, multiplies)
