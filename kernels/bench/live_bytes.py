"""How many bytes of tensors live on the CPU at the same time, as torch's own allocator reports them."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from torch.autograd.profiler import profile


class LiveBytes:
    """Follow every allocation between enter and exit; `peak` and `end` are relative to the bytes at the beginning."""

    def __init__(self) -> None:
        self.peak = 0
        self.end = 0
        self._profile: Any = profile(profile_memory=True, use_kineto=True)

    def __enter__(self) -> Self:
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, trace)
        for event in self._profile.kineto_results.events():
            if event.name() == "[memory]":
                self.end += event.nbytes()
                self.peak = max(self.peak, self.end)
