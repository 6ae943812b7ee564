"""Decode steps as CUDA graphs, each captured when a number of rows first needs it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trimkv_cli.plan.step import GRAPH_ROWS

Forward = Callable[
    [Tensor, Tensor, int], Tensor
]  # ids and positions of all rows, count of the first → logits [count, V]

_WARM_UPS = 2


class GraphedForward:
    """Run `forward` as a graph, and as it is where no graph can be captured.

    The tensors of ids and positions must be the same ones on every call: a graph reads where it was captured. All
    graphs are captured on one stream of their own, on which `forward` is run before: torch keeps a workspace for each
    stream that multiplies, and frees it with any graph of that stream. So they live and die together.
    """

    def __init__(self, forward: Forward) -> None:
        self.obstacle: str | None = None  # why some number of rows has no graph
        self._forward = forward
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._plain: set[int] = set()  # numbers of rows without one
        self._begin()

    def __call__(self, ids: Tensor, position: Tensor, count: int) -> Tensor:
        rows = next((size for size in GRAPH_ROWS if count <= size <= len(ids)), len(ids))
        if rows not in self._graphs and rows not in self._plain:
            self._try_capture(ids, position, rows)
        if rows in self._plain:
            return self._forward(ids, position, count)
        graph, logits = self._graphs[rows]
        graph.replay()
        return logits[:count]

    def forget(self) -> None:
        """Let go of all graphs and their memory: what they read may lie elsewhere soon, or be gone."""
        self._drop()
        self._plain.clear()

    def _drop(self) -> None:
        torch.cuda.synchronize()  # a replay may be on its way
        for graph, _ in self._graphs.values():
            graph.reset()
        self._graphs.clear()
        self._begin()  # a pool whose graphs are gone cannot be captured into again

    def _begin(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def _try_capture(self, ids: Tensor, position: Tensor, rows: int) -> None:
        """Capture a graph, or remember that this number of rows has none: then the others are captured anew."""
        try:
            self._graphs[rows] = self._capture(ids, position, rows)
        except (MemoryError, RuntimeError) as error:  # of a capture that was broken off only that is said
            self.obstacle = (str(error) or type(error).__name__).splitlines()[0]
        if rows not in self._graphs:  # here the error's frames, which hold tensors, are gone
            self._plain.add(rows)
            self._drop()

    def _capture(self, ids: Tensor, position: Tensor, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Capture with no token in any row, so that warming up feeds nothing."""
        held, here = position.clone(), torch.cuda.current_stream()
        position.fill_(-1)
        self._stream.wait_stream(here)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):  # a capture that fails to end leaves its stream the current one
                for _ in range(_WARM_UPS):
                    self._forward(ids, position, rows)
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    logits = self._forward(ids, position, rows)
        finally:
            here.wait_stream(self._stream)
            position.copy_(held)
        return graph, logits
