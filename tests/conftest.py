"""What all tests share: settings, and tiny random models of every family."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_models import make_model

with suppress(ImportError):  # a bare machine with a GPU runs the tests that do without
    from hypothesis import HealthCheck, settings

    settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("untimed")  # a busy machine is no failure

os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="trimkv-")  # where no server of another process is found
atexit.register(shutil.rmtree, os.environ["XDG_RUNTIME_DIR"], ignore_errors=True)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on the CPU
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _subnormal_numbers() -> Iterator[None]:
    """Training takes numbers near 0 for 0 in its whole process; a later test must not."""
    import torch

    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def golden() -> Path:
    """Return the folder with the authors' own cases."""
    return GOLDEN


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """Return `make_model`."""
    return make_model
