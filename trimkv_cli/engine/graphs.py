"""A forward replayed from CUDA graphs, one for each of a few numbers of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from trimkv_cli.engine.ahead import Forward

_BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class GraphedForward:
    """Run `forward` as a graph that is captured when a number of rows first needs it.

    The tensors of ids and positions must be the same ones on every call: a graph reads where it was captured.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, ids: Tensor, position: Tensor, count: int) -> Tensor:
        rows = next((size for size in _BUCKETS if count <= size <= len(ids)), len(ids))
        if rows not in self._graphs:
            self._graphs[rows] = self._capture(ids, position, rows)
        graph, logits = self._graphs[rows]
        graph.replay()
        return logits[:count]

    def _capture(self, ids: Tensor, position: Tensor, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Capture with no token in any row, so that warming up feeds nothing."""
        held = position.clone()
        position.fill_(-1)
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(2):
                self._forward(ids, position, rows)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward(ids, position, rows)
        position.copy_(held)
        return graph, logits
