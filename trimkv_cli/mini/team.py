"""Processes that train one model together: each takes its part of a step, all take the sum."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

from trimkv_cli.engine.devices import settle


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """One process's place among `size`; alone it needs nobody."""

    rank: int = 0
    size: int = 1

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes."""
        if self.size == 1:
            return
        together = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in together])
        distributed.all_reduce(flat)
        for tensor, part in zip(together, torch.split(flat, [tensor.numel() for tensor in together]), strict=True):
            tensor.copy_(part.view_as(tensor))


Work = Callable[[Team], None]


def work_together(size: int, work: Work) -> None:
    """Run `work` in `size` processes of one thread each, which end with this one; `work` must be picklable."""
    if size == 1:
        settle(1)
        work(Team())
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        spawn(_join, args=(size, meeting, work), nprocs=size)  # type: ignore[no-untyped-call]


def _join(rank: int, size: int, meeting: str, work: Work) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    settle(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    try:
        work(Team(rank=rank, size=size))
    finally:
        distributed.destroy_process_group()


def _end_with_parent() -> None:
    """End this process once its parent is gone, however that went: nobody would stop it any more.

    torch asks for a SIGINT then, on Linux; a process that a shell started in the background ignores it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
