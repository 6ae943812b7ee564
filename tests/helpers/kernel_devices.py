"""Where the tests of kernels run: in the interpreter on a CPU, and on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

CPU = pytest.param(
    "cpu",
    marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is off beside a GPU"),
)
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")],
)
