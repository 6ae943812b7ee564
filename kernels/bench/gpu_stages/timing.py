"""Time of a GPU: of a step's kernels by name, and of operations in a captured graph; elsewhere the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from bench.gpu_stages.stage import Facts, Setting, wait_for

Step = Callable[[], Any]
_NAMED = 15  # kernels of a profile that a row lists
_BEFORE = 3  # replays that do not count


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What ran in one step: `kernels` are names, how often they ran and their microseconds, the longest first."""

    kernels: Sequence[tuple[str, int, float]]

    @property
    def count(self) -> int:
        return sum(calls for _, calls, _ in self.kernels)

    @property
    def us(self) -> float:
        return sum(us for _, _, us in self.kernels)

    @property
    def facts(self) -> Facts:
        longest = [f"{calls} × {name}: {us:.0f} µs" for name, calls, us in self.kernels[:_NAMED]]
        return {"kernels": self.count, "busy_us": round(self.us, 1), "longest": longest}


def profiled(step: Step, setting: Setting) -> Profile:
    """Run a step once in torch's profiler: on a GPU its kernels count, on a CPU the operations of torch."""
    activity = ProfilerActivity.CUDA if setting.on_gpu else ProfilerActivity.CPU
    wait_for(setting.device)
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        wait_for(setting.device)
    kind = torch.autograd.DeviceType.CUDA if setting.on_gpu else torch.autograd.DeviceType.CPU
    kernels: dict[str, tuple[int, float]] = {}
    for event in profile.events() or ():
        if event.device_type == kind:
            calls, us = kernels.get(event.name, (0, 0.0))
            taken = event.time_range.elapsed_us() if setting.on_gpu else event.self_cpu_time_total
            kernels[event.name] = calls + 1, us + taken
    rows = [(name[:80], calls, us) for name, (calls, us) in kernels.items()]
    return Profile(kernels=sorted(rows, key=lambda row: -row[2]))


def seconds_each(steps: Sequence[Step], setting: Setting, *, replays: int) -> float:
    """Return the seconds of one of these steps, which should work on memory of their own so that none finds it cached.

    On a GPU all are captured in one graph, one after the other: what a launch costs the host is no part of it.
    """
    for step in steps:  # what is compiled or loaded when it is first needed is no part of it either
        step()
    wait_for(setting.device)
    times = (_replayed if setting.on_gpu else _called)(steps, replays)
    return median(times) / len(steps)


def _called(steps: Sequence[Step], replays: int) -> list[float]:
    times = []
    for _ in range(replays):
        started = time.perf_counter()
        for step in steps:
            step()
        times.append(time.perf_counter() - started)
    return times


def _replayed(steps: Sequence[Step], replays: int) -> list[float]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    for _ in range(_BEFORE):
        graph.replay()
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) / 1e3 for first, last in pairwise(events)]
