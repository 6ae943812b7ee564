"""Parts of a decode step as CUDA graphs, each captured when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

_WARM_UPS = 2


class Graphs:
    """Own what was captured, by any key, and know what cannot be.

    What is captured reads and writes where its tensors were then, and is captured while no row of `position` has a
    token, so that warming up feeds nothing. All graphs are captured on one stream of their own, on which the same is
    run before: torch keeps a workspace for each stream that multiplies, and frees it with any graph of that stream. So
    they live and die together.
    """

    def __init__(self, position: Tensor) -> None:
        self.obstacle: str | None = None  # why something has no graph
        self._position = position
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._plain: set[Hashable] = set()  # what has none
        self._begin()

    def replay(self, key: Hashable, run: Callable[[], Tensor]) -> Tensor | None:
        """Do what `run` does under this key, as a graph; None when it has to be run as it is.

        The tensor returned is the same one each time: the next replay overwrites it.
        """
        if key not in self._captured and key not in self._plain:
            self._try_capture(key, run)
        if key in self._plain:
            return None
        graph, made = self._captured[key]
        graph.replay()
        return made

    def __contains__(self, key: Hashable) -> bool:
        return key in self._captured

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._captured)

    def forget(self) -> None:
        """Let go of all graphs and their memory: what they read may lie elsewhere soon, or be gone."""
        self._drop()
        self._plain.clear()

    def _drop(self) -> None:
        torch.cuda.synchronize()  # a replay may be on its way
        for graph, _ in self._captured.values():
            graph.reset()
        self._captured.clear()
        self._begin()  # a pool whose graphs are gone cannot be captured into again

    def _begin(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def _try_capture(self, key: Hashable, run: Callable[[], Tensor]) -> None:
        """Capture a graph, or remember that there is none under this key: then the others are captured anew."""
        try:
            self._captured[key] = self._capture(run)
        except (MemoryError, RuntimeError) as error:  # of a capture that was broken off only that is said
            self.obstacle = (str(error) or type(error).__name__).splitlines()[0]
        if key not in self._captured:  # here the error's frames, which hold tensors, are gone
            self._plain.add(key)
            self._drop()

    def _capture(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        held, here = self._position.clone(), torch.cuda.current_stream()
        self._position.fill_(-1)
        self._stream.wait_stream(here)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):  # a capture that fails to end leaves its stream the current one
                for _ in range(_WARM_UPS):
                    run()
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    made = run()
        finally:
            here.wait_stream(self._stream)
            self._position.copy_(held)
        return graph, made
