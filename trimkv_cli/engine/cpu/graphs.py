"""Graphs of what a step does, which run without Python between their operations."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

WORTH_RECORDING = 16  # calls
_RECORDED = 16  # graphs at a time: each row count and each kind of mask is another

Tensors = tuple[Tensor, ...]


class Graphs:
    """Call a function of tensors that always does the same with the same shapes, soon as a graph of torch.

    Tensors that it changes have to be among its arguments, and doing it twice is to be as doing it once.
    A step of a small model is a thousand operations, and Python between them takes a quarter of its time.
    """

    def __init__(self, function: Callable[..., Tensors]) -> None:
        self._function = function
        self._graphs: dict[Hashable, Callable[..., Tensors] | None] = {}
        self._calls: Counter[Hashable] = Counter()

    def __call__(self, *tensors: Tensor) -> Tensors:
        shapes = tuple(tensor.shape for tensor in tensors)
        graph = self._graphs.get(shapes)
        if graph is not None:
            return graph(*tensors)
        self._calls[shapes] += 1
        if self._calls[shapes] == WORTH_RECORDING and len(self._graphs) < _RECORDED:
            self._graphs[shapes] = _record(self._function, tensors)
        return self._function(*tensors)

    def forget(self) -> None:
        """Let go of all graphs, and with them of the tensors that the function reads: they may lie elsewhere soon."""
        self._graphs.clear()
        self._calls.clear()


def _record(function: Callable[..., Tensors], tensors: Tensors) -> Callable[..., Tensors] | None:
    """Record what a function does; None where torch has no graph for it."""
    trace: Any = torch.jit.trace
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that become constants, as they should, and of what follows `trace`
        try:
            graph: Callable[..., Tensors] = trace(function, tensors, check_trace=False)
        except RuntimeError:
            return None
    return graph
