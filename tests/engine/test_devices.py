"""Which GPU a process computes on, without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimkv_cli.bench.shapes import find_shape, random_network
from trimkv_cli.engine.devices import take_device
from trimkv_cli.errors import UsageError
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.train import run

OPTIONS = EngineOptions(model="mini", device="cuda:1")


class Taken(Exception):
    """Ends what a test started where it has seen enough."""


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Pretend to have two GPUs; return the bytes allocated on each, to be changed."""
    sizes = {0: 0, 1: 0}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
    monkeypatch.setattr(torch.cuda, "memory_allocated", sizes.__getitem__)
    return sizes


@pytest.mark.parametrize(
    "start",
    [
        lambda: load_engine(OPTIONS),
        lambda: random_network(find_shape("10m"), OPTIONS),
        lambda: run._make_trainer(OPTIONS, *(None,) * 3),
    ],
    ids=["load", "random weights", "train"],
)
def test_the_second_gpu_becomes_the_current_one(
    start: Callable[[], Any], allocated: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches kernels, graphs and events on the first GPU, for tensors on the second."""
    chosen: list[torch.device] = []

    def set_device(device: torch.device) -> None:
        chosen.append(device)
        raise Taken

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(Taken):
        start()
    assert chosen == [torch.device("cuda", 1)]


def test_two_gpus_in_one_process_are_refused(allocated: dict[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second engine that moves the current GPU away under the first one."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    allocated[0] = 512
    with pytest.raises(UsageError, match="uses cuda:0 already"):
        take_device("cuda:1")
    assert not chosen
    take_device("cuda:0")
    allocated[0] = 0
    take_device("cuda:1")
    assert chosen == [torch.device("cuda", 0), torch.device("cuda", 1)]
