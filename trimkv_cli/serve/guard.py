"""Who may ask: the Host that a request names, and the key that it brings."""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass

import orjson
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from trimkv_cli.serve.errors import ApiError

_OPEN = ("/health",)  # needs no key


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """Let requests through to the application that name this host, and bring the key where there is one.

    Without a key only names of this machine's own are taken: a page whose name was made to point here (DNS rebinding)
    brings its own.
    """

    app: ASGIApp
    hosts: frozenset[str]
    api_key: str | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            await send_error(refusal, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = host_name(headers.get("host", ""))
        if self.api_key is None and host not in self.hosts and not _is_loopback(host):
            return ApiError(403, f"the host {host[:64]!r} is not this server's", code="host_not_allowed")
        if self.api_key is None or scope["path"] in _OPEN:
            return None
        kind, _, key = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self.api_key.encode()):
            return None
        hint = {"www-authenticate": "Bearer"}
        return ApiError(401, "the API key is missing or wrong", code="invalid_api_key", headers=hint)


def host_name(header: str) -> str:
    """Return a Host header without its port."""
    name = header.partition("]")[0].removeprefix("[") if header.startswith("[") else header.partition(":")[0]
    return name.lower().rstrip(".")


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def send_error(error: ApiError, send: Send) -> None:
    """Send an error object."""
    headers = {"content-type": "application/json", **error.headers}
    raw = [(key.encode(), value.encode()) for key, value in headers.items()]
    body = orjson.dumps(error.to_json())
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
