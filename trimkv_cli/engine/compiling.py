"""torch.compile for decode steps: where a compiler is, and where what it makes is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from trimkv_cli.errors import UsageError

Step = TypeVar("Step", bound=Callable[..., Any])


def compile_step(step: Step) -> Step:
    """Return `step` compiled into one graph, for the sizes of its first call.

    Raises:
        UsageError: there is no C++ compiler, which a CPU's code and a GPU's launchers are made with.
    """
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((named,) if named else ("g++", "clang++", "c++"))):
        raise UsageError(
            f"--compile needs a C++ compiler, and there is no {named or 'g++, clang++ or c++'} here",
            hint="install one, as with apt install g++, or leave out --compile",
        )
    return cast("Step", torch.compile(step, fullgraph=True, dynamic=False))
