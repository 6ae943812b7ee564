"""Catches a plan for one GPU that is made with the memory of another."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from trimkv_cli.model.driver import gpus_here

HERE = ["small", "large"]


class NVMLError(Exception): ...


def fake_nvml(*, broken: bool = False) -> SimpleNamespace:
    def start() -> None:
        if broken:
            raise NVMLError("no driver")

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=start,
        nvmlDeviceGetCount=lambda: len(HERE),
        nvmlDeviceGetHandleByIndex=lambda index: HERE[index],
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid.removeprefix("GPU-"),
        nvmlDeviceGetName=lambda handle: handle.encode(),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=len(handle), free=1),
        nvmlDeviceGetCudaComputeCapability=lambda handle: (8, HERE.index(handle)),
    )


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, HERE),
        ("1", ["large"]),
        ("1, 0", ["large", "small"]),
        ("GPU-large", ["large"]),
        ("", []),
        ("0,7,1", ["small"]),
    ],
)
def test_visible_gpus_are_counted_as_cuda_counts_them(
    visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches cuda:0 that is the first of the machine, where the process may see another alone."""
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = gpus_here()
    assert [gpu.name for gpu in found] == names
    assert all(gpu.capability == (8, HERE.index(gpu.name)) for gpu in found)


@pytest.mark.parametrize("module", [None, fake_nvml(broken=True)])
def test_no_driver_is_no_gpu(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a plan that ends where nothing can be asked."""
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert gpus_here() == []
