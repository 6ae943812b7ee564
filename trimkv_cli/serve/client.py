"""A running server asked over HTTP: its chunks as they come, its errors as ours."""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from trimkv_cli import __version__
from trimkv_cli.errors import ContextOverflow, OutOfDeviceMemory, TrimkvError, UsageError
from trimkv_cli.serve.about import About

_LOOK_S = 0.1  # for the next chunk, before the caller may do something else
_PATIENCE_S = 5.0  # for a server to say what it is; an answer may wait for other requests


class NoAnswer(TrimkvError):
    """Report a server that is not there, or that breaks off."""


class Client:
    """One connection to a server.

    Raises:
        UsageError: no URL of one.
    """

    def __init__(self, url: str, api_key: str | None = None, *, patience_s: float = _PATIENCE_S) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        parts = urlsplit(self.url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if not parts.hostname or port == -1 or parts.path or parts.query or parts.username:
            raise UsageError(f"{url} is not the URL of a server", hint="as http://127.0.0.1:8012")
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._connection = kind(parts.hostname, port, timeout=patience_s)
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._headers["user-agent"] = f"trimkv/{__version__}"
        self._socket: socket.socket | None = None
        self._hung_up = False

    def about(self) -> About:
        """Ask what the server runs.

        Raises:
            NoAnswer: it does not answer.
            UsageError: it is no server of this release, or wants a key.
        """
        data = self.get("/v1/models")
        models = data.get("data") if isinstance(data, dict) else None
        first = models[0] if isinstance(models, list) and models and isinstance(models[0], dict) else {}
        about = About.from_json(first.get("trimkv"))
        if about is None:
            hint = "--server off; other endpoints have clients of their own"
            raise UsageError(f"{self.url} is no trimkv {__version__} server", hint=hint)
        return about

    def get(self, path: str) -> Any:
        """Return the JSON, or else the text, that a path holds; raises as `stream` does."""
        try:
            body = self._send("GET", path).read()
        except (OSError, HTTPException) as error:
            raise self._no_answer(error) from None
        try:
            return json.loads(body)
        except ValueError:
            return body.decode("utf-8", "replace")

    def stream(
        self, path: str, body: Mapping[str, Any], *, headers: Mapping[str, str] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield the chunks of an answer; to leave off is to end the request.

        Raises:
            NoAnswer: the server is not there, or breaks off.
            TrimkvError: what it says, with the exit code that the same has without a server.
        """
        try:
            response = self._send("POST", path, json.dumps(body).encode(), headers)
            for line in iter(response.readline, b""):
                kind, _, data = line.partition(b": ")
                if kind != b"data":
                    continue
                if data.strip() == b"[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise _error(500, chunk, None)
                yield chunk
        except (OSError, HTTPException, ValueError) as error:
            raise self._no_answer(error) from None
        finally:
            self.close()
        raise NoAnswer(f"{self.url} broke off its answer", hint="trimkv ps shows whether it still runs")

    def listen(
        self, path: str, body: Mapping[str, Any], stopped: Callable[[], bool]
    ) -> Iterator[dict[str, Any] | None]:
        """Yield chunks as `stream` does, and None while none comes; once `stopped()` is true, end the request."""
        heard: queue.SimpleQueue[dict[str, Any] | Exception | None] = queue.SimpleQueue()

        def hear() -> None:
            try:
                for chunk in self.stream(path, body):
                    heard.put(chunk)
            except Exception as error:  # noqa: BLE001  raised below
                heard.put(error)
            else:
                heard.put(None)

        threading.Thread(target=hear, name="trimkv-client", daemon=True).start()
        try:
            while not stopped():
                try:
                    news = heard.get(timeout=_LOOK_S)
                except queue.Empty:
                    yield None
                    continue
                if news is None:
                    return
                if isinstance(news, Exception):
                    raise news
                yield news
        finally:
            self.hang_up()

    def hang_up(self) -> None:
        """End the connection while another thread listens, which then hears that the server broke off."""
        self._hung_up = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection, and what the server does for it."""
        self._connection.close()

    def _send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> HTTPResponse:
        sent = {**self._headers, **(headers or {})}
        if body is not None:
            sent["content-type"] = "application/json"
        if self._connection.sock is None:
            self._connection.connect()
        self._socket = self._connection.sock
        if self._hung_up:
            raise NoAnswer(f"{self.url} is not asked any more")
        if body is not None:
            _wait_forever(self._connection.sock)
        self._connection.request(method, path, body, sent)
        response = self._connection.getresponse()
        if response.status != 200:
            raise _error(response.status, _json_of(response), response.headers.get("retry-after"))
        return response

    def _no_answer(self, error: Exception) -> NoAnswer:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return NoAnswer(f"{self.url} does not answer: {reason}", hint="trimkv ps shows what runs")


def _wait_forever(opened: socket.socket) -> None:
    """Wait for an answer as long as it takes, but not for a machine that is gone."""
    opened.settimeout(None)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _json_of(response: HTTPResponse) -> Any:
    try:
        return json.loads(response.read(1 << 20))
    except ValueError:
        return None


_CODES: Mapping[str, type[TrimkvError]] = {
    "context_length_exceeded": ContextOverflow,
    "out_of_memory": OutOfDeviceMemory,
}


def _error(status: int, body: Any, retry_after: str | None) -> TrimkvError:
    """Return what a server says as the error that it is without one."""
    said = body.get("error") if isinstance(body, dict) else None
    said = said if isinstance(said, dict) else {}
    message = str(said.get("message") or f"the server answers with status {status}")
    kind = _CODES.get(str(said.get("code")), UsageError if 400 <= status < 500 and status != 429 else TrimkvError)
    return kind(message, hint=_hint(status, retry_after))


def _hint(status: int, retry_after: str | None) -> str | None:
    if status == 401:
        return "TRIMKV_API_KEY=KEY, or --api-key"
    if status in (429, 503):
        wait = f"in {retry_after} s, " if (retry_after or "").isdigit() else ""
        return f"try again {wait}or --server off"
    return None
