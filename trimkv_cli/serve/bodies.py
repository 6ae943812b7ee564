"""Bodies of requests: read whole, as JSON, and only so many bytes of them in memory at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
from starlette.requests import Request

from trimkv_cli.jobs.lines import from_json
from trimkv_cli.serve.errors import ApiError

BYTES_EACH = 5  # that a byte of a body takes while it is read: itself, decoded, parsed, and again as texts
_ARRIVES_S = 60.0  # within which a body has to
_SMALL = 64 * 1024  # bytes, of which the queue may hold hundreds


class Bodies:
    """Read bodies of up to `most` bytes; those of more than 64 KiB have so many together, and others wait unread."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._held = 0
        self._freed = asyncio.Condition()
        self._turn = asyncio.Lock()  # the first that waits is the next

    @asynccontextmanager
    async def json(self, request: Request) -> AsyncIterator[Any]:
        """Read a body as JSON; its bytes count until the block ends.

        Raises:
            ApiError: it is none, larger than `most` bytes, or does not arrive.
        """
        async with self._room(self._size(request)):
            yield _parsed(await self.read(request))

    async def read(self, request: Request) -> bytes:
        """Read a body as it stands.

        Raises:
            ApiError: it is larger than `most` bytes, or does not arrive.
        """
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(_ARRIVES_S):
                async for part in request.stream():
                    size += len(part)
                    if size > self.most:
                        raise self._too_large()
                    parts.append(part)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {_ARRIVES_S:g} s") from None
        return b"".join(parts)

    def _size(self, request: Request) -> int:
        """Return how large a body says that it is, or may be where it says nothing."""
        said = request.headers.get("content-length", "")
        size = int(said) if said.isascii() and said.isdigit() else self.most
        if size > self.most:
            raise self._too_large()
        return size

    def _too_large(self) -> ApiError:
        headers = {"connection": "close"}  # what is on its way is not read
        return ApiError(413, f"the body is larger than {self.most:,} bytes", code="body_too_large", headers=headers)

    @asynccontextmanager
    async def _room(self, size: int) -> AsyncIterator[None]:
        if size <= _SMALL:
            yield
            return
        async with self._turn, self._freed:
            await self._freed.wait_for(lambda: self._held + size <= self.most)
            self._held += size
        try:
            yield
        finally:
            self._held -= size
            async with self._freed:
                self._freed.notify_all()


def _parsed(body: bytes) -> Any:
    try:
        return from_json(body.decode())
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} at column {error.colno}") from None
