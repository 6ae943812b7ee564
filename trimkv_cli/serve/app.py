"""The application: its routes, and the one place that turns whatever goes wrong into an error object."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from trimkv_cli.serve.completions import CACHE_HEADER, Completions, Gone
from trimkv_cli.serve.errors import ApiError
from trimkv_cli.serve.files import json_response
from trimkv_cli.serve.guard import Guard
from trimkv_cli.serve.metrics import metrics_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Whom a server answers: the names it goes by, the key it wants, the pages that may ask from a browser."""

    hosts: frozenset[str] = frozenset()
    api_key: str | None = None
    cors: tuple[str, ...] = ()


def make_app(
    completions: Completions,
    *,
    model_id: str,
    names: frozenset[str],
    trust: Trust,
    others: Sequence[Route] = (),
    about: Mapping[str, Any] | None = None,
) -> ASGIApp:
    """Return the application over what answers completions, with `others` beside it; `about` is said of the model."""
    worker = completions.worker
    models = _Models(model_id=model_id, names=names, created=int(time.time()), more={"trimkv": about} if about else {})

    async def health(_: Request) -> Response:
        gauge = worker.gauge
        return json_response(
            {"status": "ok", "loaded": gauge.loaded, "running": gauge.running, "waiting": gauge.waiting}
        )

    async def metrics(_: Request) -> Response:
        return Response(metrics_text(worker.gauge), media_type="text/plain; version=0.0.4")

    routes = [
        Route("/v1/chat/completions", completions.chat, methods=["POST"]),
        Route("/v1/completions", completions.completion, methods=["POST"]),
        Route("/v1/models", models.all, methods=["GET"]),
        Route("/v1/models/{name:path}", models.one, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        *others,
    ]
    allowed: Sequence[Middleware] = ()
    if trust.cors:
        every = ["*"]
        allowed = (
            Middleware(
                CORSMiddleware,
                allow_origins=list(trust.cors),
                allow_methods=every,
                allow_headers=every,
                expose_headers=[CACHE_HEADER],
            ),
        )
    handlers = {ApiError: _refuse, HTTPException: _refuse_http, Gone: _nobody, Exception: _fault}
    app = Starlette(routes=routes, middleware=list(allowed), exception_handlers=handlers)
    return Guard(app=app, hosts=trust.hosts, api_key=trust.api_key)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Models:
    """The one model, under all its names."""

    model_id: str
    names: frozenset[str]
    created: int
    more: Mapping[str, Any] = field(default_factory=dict)

    async def all(self, _: Request) -> Response:
        return json_response({"object": "list", "data": [self._about(self.model_id)]})

    async def one(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.model_id and name not in self.names:
            raise ApiError(404, f"the model {name[:64]!r} does not run here", param="model", code="model_not_found")
        return json_response(self._about(name))

    def _about(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "trimkv", **self.more}


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return json_response(error.to_json(), error.status, error.headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {
        404: f"there is no {request.url.path[:64]!r}; trimkv serve --help lists what there is",
        405: f"{request.url.path} does not take {request.method[:16]}",
    }
    refusal = ApiError(error.status_code, what.get(error.status_code, error.detail), headers=error.headers)
    return await _refuse(request, refusal)


async def _nobody(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # which nobody reads


async def _fault(request: Request, error: Exception) -> Response:
    return await _refuse(request, ApiError.of(error))
