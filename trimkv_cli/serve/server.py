"""A server on its port: bound before anything is loaded, drained when it is told to end."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

import orjson
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from trimkv_cli.errors import TrimkvError, UsageError
from trimkv_cli.serve.errors import ApiError
from trimkv_cli.streams import Interrupts

_WAIT_S = 0.5
_HEADER_S = 30.0  # for a request's header to arrive
_LAST_WORDS_S = 5  # for what is said to those whose time is over
_BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """Take a port; 0 = any that is free.

    Raises:
        UsageError: it is taken, or not ours to take, or there is no such address.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror}", hint="an address of this machine: 127.0.0.1") from None
    opened = socket.socket(kind, socket.SOCK_STREAM)
    if os.name == "posix":
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier server may linger
    try:
        opened.bind(address)
    except OSError as error:
        opened.close()
        hint = f"--port {port + 1}, or trimkv ps: it may be another server" if error.errno == errno.EADDRINUSE else None
        raise UsageError(f"port {port} of {host} cannot be taken: {error.strerror}", hint=hint) from None
    return opened


class Server:
    """Serve an application in a thread of its own, until the first signal; then finish what runs, for `grace_s`.

    `late` is called when that time is over, and ends it.
    """

    def __init__(
        self, app: ASGIApp, opened: socket.socket, *, grace_s: float, late: Callable[[], None] = lambda: None
    ) -> None:
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
        config = uvicorn.Config(
            app,
            http=_Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=round(grace_s) + _LAST_WORDS_S,
        )
        self._grace_s = grace_s
        self._late = late
        self._server = uvicorn.Server(config)
        self._opened = opened
        self._thread = threading.Thread(target=self._run, name="trimkv-http", daemon=True)
        self._fault: BaseException | None = None

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until a signal asks for the end; `ready` is called once requests are taken.

        Raises:
            TrimkvError: the server itself failed.
        """
        with Interrupts(on_first=self.stop), self:
            while not self._server.started and self._thread.is_alive():
                self._thread.join(0.01)
            if self._thread.is_alive():
                ready()
            while self._thread.is_alive() and not self._server.should_exit:
                self._thread.join(_WAIT_S)
            self._drain()
        if self._fault is not None:
            raise TrimkvError(
                f"the server failed: {self._fault}", hint="TRIMKV_DEBUG=1 shows where this happened"
            ) from self._fault

    def _drain(self) -> None:
        until = time.monotonic() + self._grace_s
        while self._thread.is_alive() and (left := until - time.monotonic()) > 0:
            self._thread.join(min(left, _WAIT_S))
        if self._thread.is_alive():
            self._late()
        while self._thread.is_alive():
            self._thread.join(_WAIT_S)

    def stop(self) -> None:
        """Take no more connections, and end when those that there are have ended."""
        self._server.should_exit = True

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.force_exit = self._server.should_exit = True
        self._opened.close()

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._opened])
        except BaseException as error:  # noqa: BLE001  it is raised in the thread that waits
            self._fault = error


class _Connection(H11Protocol):
    """One connection, closed where no whole header arrives in time: one byte now and then is no request."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as everything else is answered: with an error object."""
        body = orjson.dumps(ApiError(400, f"this is no HTTP that is understood here: {msg}").to_json())
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def on_response_complete(self) -> None:
        self._expect()
        super().on_response_complete()

    def _expect(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(_HEADER_S, self._give_up)

    def _give_up(self) -> None:
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request
        if cycle is None or cycle.response_complete:
            self.transport.close()
