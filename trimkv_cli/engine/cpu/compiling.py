"""torch.compile for decode steps: where a compiler is, and where what it makes is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trimkv_cli.errors import UsageError

_GRAPHS = 64  # of one process: each engine has its own, and each size of its cache


def compile_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return `step` compiled into one graph for each `key`, a further argument: whole numbers that tell graphs apart.

    Nothing else that a graph depends on is looked at again: that would take a tenth of a small model's step.

    Raises:
        UsageError: there is no C++ compiler, which a CPU's code and a GPU's launchers are made with.
    """
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((named,) if named else ("g++", "clang++", "c++"))):
        raise UsageError(
            f"--compile needs a C++ compiler, and there is no {named or 'g++, clang++ or c++'} here",
            hint="install one, as with apt install g++, or leave out --compile",
        )
    torch._dynamo.config.recompile_limit = _GRAPHS

    def keyed(*args: Any, key: tuple[int, ...], **kwargs: Any) -> Any:
        assert all(part >= 0 for part in key)  # what is not read is not looked at
        return step(*args, **kwargs)

    options: dict[str, str | int | bool | Callable[..., Any]] = {"guard_filter_fn": _guards_of_key, "cpp_wrapper": True}
    return torch.compile(keyed, fullgraph=True, dynamic=False, options=options)


def _guards_of_key(guards: Sequence[Any]) -> list[bool]:
    return [guard.name.startswith("key") for guard in guards]
