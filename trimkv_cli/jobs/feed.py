"""Reads ahead in a thread, so that a slow input never holds up requests in flight."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

_PUT_TIMEOUT_S = 0.2


class _End:
    """Close the queue; carries what the source raised."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Feed(Generic[T]):
    """Take items from `source` as they come, with at most `ahead` of them read in advance."""

    def __init__(self, source: Iterable[T], *, ahead: int = 64) -> None:
        self.exhausted = False
        self._queue: queue.Queue[T | _End] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(source,), name="trimkv-input", daemon=True)
        self._thread.start()

    def take(self, *, wait_s: float = 0.0) -> T | None:
        """Return the next item, or None when there is none yet (see `exhausted`); re-raises the source's error."""
        if self.exhausted:
            return None
        try:
            item = self._queue.get(timeout=wait_s) if wait_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None
        if not isinstance(item, _End):
            return item
        self.exhausted = True
        if item.error is not None:
            raise item.error
        return None

    def close(self) -> None:
        """Stop reading; a thread that is blocked in the source is left behind."""
        self._closed.set()
        self._thread.join(timeout=2 * _PUT_TIMEOUT_S)

    def __enter__(self) -> Feed[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _read(self, source: Iterable[T]) -> None:
        try:
            for item in source:
                if not self._put(item):
                    return
        except BaseException as error:  # noqa: BLE001  it is raised where the items are taken
            self._put(_End(error))
        else:
            self._put(_End())

    def _put(self, item: T | _End) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=_PUT_TIMEOUT_S)
            except queue.Full:
                continue
            return True
        return False
