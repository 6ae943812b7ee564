"""Which operations a GPU gets, and what is said where Triton does not run: no GPU is needed for that."""

from __future__ import annotations

import builtins
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from trimkv_cli.bench.shapes import find_shape, random_network
from trimkv_cli.loading import checkup
from trimkv_cli.loading.device_warnings import device_warnings
from trimkv_cli.loading.options import EngineOptions
from trimkv_kernels import operations, reference
from trimkv_kernels.operations import Obstacle, Operations, operations_for, triton_obstacle

GPU = torch.device("cuda", 0)
REFERENCE = Operations(reference.decode, reference.prefill)


@pytest.fixture(autouse=True)
def _one_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend to have a GPU on which nothing was tried yet."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    triton_obstacle.cache_clear()
    yield
    triton_obstacle.cache_clear()


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing import triton."""
    real = builtins.__import__

    def hooked(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    for name in [name for name in sys.modules if name.startswith(("triton.", "trimkv_kernels.trial"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(builtins, "__import__", hooked)


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the trivial kernel fail."""
    trial = pytest.importorskip("trimkv_kernels.trial", reason="triton has no wheel for this platform")

    def run_trial(_: torch.device) -> None:
        raise error

    monkeypatch.setattr(trial, "run_trial", run_trial)


@pytest.mark.usefixtures("without_triton")
def test_without_triton_the_reference_runs_and_that_is_said_once() -> None:
    """Catches a GPU on which the first engine ends in ModuleNotFoundError, and one that is silently slow."""
    assert operations_for(GPU) == REFERENCE
    (warning,) = device_warnings("auto", GPU)
    assert warning.code == "no_triton"
    assert "triton is not installed" in warning.message
    (finding,) = checkup.kernels()
    assert finding.status == "note"
    assert "triton is not installed" in finding.detail


@pytest.mark.parametrize(
    ("error", "missing", "said"),
    [
        (RuntimeError("Failed to find C compiler."), "compiler", "no C compiler"),
        (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]), "header", "Python.h"),
        (AssertionError("libcuda.so cannot found!\nPossible files"), "", "AssertionError: libcuda.so cannot found!"),
    ],
)
def test_a_kernel_that_cannot_be_built_is_no_crash(
    error: Exception, missing: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a machine without compiler or headers on which every run ends in a traceback of triton's build."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(operations.shutil, "which", lambda name: None if missing == "compiler" else f"/bin/{name}")
    monkeypatch.setattr(operations.Path, "is_file", lambda _: missing != "header")
    fail_with(error, monkeypatch)
    assert operations_for(GPU) == REFERENCE
    found = triton_obstacle(GPU)
    assert isinstance(found, Obstacle)
    assert said in found.what
    (finding,) = checkup.kernels()
    assert finding.hint == found.remedy


def test_where_triton_runs_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches kernels that are left out although they run, and a trial that is repeated for every layer."""
    trial = pytest.importorskip("trimkv_kernels.trial", reason="triton has no wheel for this platform")
    tried: list[torch.device] = []
    monkeypatch.setattr(trial, "run_trial", tried.append)
    from trimkv_kernels.decode import decode
    from trimkv_kernels.prefill import prefill
    from trimkv_kernels.rows import clear, undo

    assert [operations_for(GPU) for _ in range(3)] == [Operations(decode, prefill, undo, clear)] * 3
    assert device_warnings("auto", GPU) == ()
    assert [finding.status for finding in checkup.kernels()] == ["ok"]
    assert tried == [GPU]


def test_the_trial_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a trivial kernel that cannot be compiled anywhere, or that nothing is compared with."""
    trial = pytest.importorskip("trimkv_kernels.trial", reason="triton has no wheel for this platform")
    monkeypatch.undo()
    if torch.cuda.is_available():
        trial.run_trial(torch.device("cuda"))
    else:
        trial.run_trial(torch.device("cpu"))


def test_running_out_of_memory_is_not_taken_for_a_missing_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a full GPU that makes everything slow for as long as the process lives."""
    fail_with(torch.OutOfMemoryError("CUDA out of memory"), monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        operations_for(GPU)


def test_a_cpu_is_not_warned() -> None:
    """Catches a warning about kernels where none would run anyway."""
    assert device_warnings("cuda", torch.device("cpu")) == ()
    assert random_network(find_shape("10m"), EngineOptions(device="cpu", threads=1)).warnings == ()


def test_a_gpu_that_torch_does_not_see_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a slow answer whose reason nobody learns, and a warning for those who chose the CPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("trimkv_cli.loading.device_warnings.has_driver", lambda: True)
    cpu = torch.device("cpu")
    assert [warning.code for warning in device_warnings("auto", cpu)] == ["gpu_not_seen"]
    assert device_warnings("cpu", cpu) == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_warnings("auto", cpu) == ()
