"""Which GPU a process computes on, without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimkv_cli.bench.shapes import find_shape, random_network
from trimkv_cli.engine.devices import take_device
from trimkv_cli.errors import UsageError
from trimkv_cli.loading import loader
from trimkv_cli.loading.loader import load_engine, plan_for
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import find_source
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


def test_a_gpu_that_is_not_there_is_refused_by_what_is(
    allocated: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an error of CUDA's own for a number too high, and a refusal that does not say what to take instead."""
    monkeypatch.setattr(torch.cuda, "get_device_name", ["NVIDIA L4", "NVIDIA A100"].__getitem__)
    with pytest.raises(UsageError, match="no cuda:9 here: there is cuda:0, NVIDIA L4; cuda:1, NVIDIA A100") as refused:
        take_device("cuda:9")
    assert refused.value.exit_code == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no cuda:0 here: torch sees no GPU"):
        take_device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Pretend to have a GPU; return what it says of itself, to be changed."""
    said: dict[str, Any] = {"total": 24 * 2**30, "free": 24 * 2**30, "capability": (8, 9)}
    monkeypatch.setattr(loader, "device_bytes", lambda _: said["total"])
    monkeypatch.setattr(loader, "free_bytes", lambda _: said["free"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: said["capability"])
    return said


def test_without_a_budget_rows_are_as_many_as_a_gpu_has_memory_free(gpu: dict[str, Any]) -> None:
    """Catches a refusal, or an allocation that fails, where fewer rows would run; and a precision or size given up."""
    options = EngineOptions(model="mini", kv_budget="4096", gates="streaming")
    source, device = find_source(options, weights=False), torch.device("cuda", 0)
    whole = plan_for(source, options, device).run
    assert whole.rows == 64
    gpu["free"] = whole.total_bytes * 2 // 5
    plan = plan_for(source, options, device)
    assert 1 < plan.run.rows < 64
    assert (plan.run.kv_budget, plan.run.dtype, plan.run.quantize) == (4096, whole.dtype, whole.quantize)
    assert plan.run.total_bytes <= gpu["free"]
    assert plan.choices[-1].endswith("as many as the free memory holds")


def test_eight_bits_are_refused_by_the_gpu_that_is_there(gpu: dict[str, Any]) -> None:
    """Catches a plan that does not know which GPU it is for."""
    options = EngineOptions(model="mini", kv_dtype="fp8")
    source, device = find_source(options, weights=False), torch.device("cuda", 0)
    assert plan_for(source, options, device).run.kv_dtype == "fp8"
    gpu["capability"] = (8, 0)
    with pytest.raises(UsageError, match="this one's is 8") as refused:
        plan_for(source, options, device)
    assert refused.value.exit_code == 2
