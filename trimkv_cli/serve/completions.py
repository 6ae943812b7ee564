"""Chat and text completions: a body as `trimkv run` reads it, an answer whole or as it comes."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
from pydantic import ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from trimkv_cli.jobs.bodies import Strict, explain
from trimkv_cli.jobs.chunks import Chunks
from trimkv_cli.jobs.lines import BadLine, Kind, Rules, parse_body
from trimkv_cli.jobs.records import Record, Recorder, encode
from trimkv_cli.jobs.requests import Tokenizer, with_warnings
from trimkv_cli.serve.bodies import Bodies
from trimkv_cli.serve.errors import ApiError
from trimkv_cli.serve.exchange import Exchange
from trimkv_cli.serve.worker import Worker

T = TypeVar("T")

CACHE_HEADER = "x-trimkv-cache"


class StreamOptions(Strict):
    """What a stream has beside its pieces."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Streaming(Strict):
    """The keys that only an endpoint honours."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """Answer the two kinds of completions over one worker."""

    worker: Worker
    text: Tokenizer | None
    rules: Rules
    recorder: Recorder
    bodies: Bodies
    continues: bool = True
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def chat(self, request: HttpRequest) -> Response:
        """Answer a chat completion."""
        return await self._answer(request, "chat")

    async def completion(self, request: HttpRequest) -> Response:
        """Answer a text completion."""
        return await self._answer(request, "completion")

    async def _answer(self, request: HttpRequest, kind: Kind) -> Response:
        async with self.bodies.json(request) as data:
            streaming = _take_streaming(data)
            item = parse_body(next(self.numbers), data, kind, self.rules, custom_id=uuid.uuid4().hex)
            if isinstance(item, BadLine):
                raise ApiError.of_line(item)
            item = with_warnings(item, self.text)
            continues = self.continues and request.headers.get(CACHE_HEADER) != "read"
            exchange = Exchange(self.worker, item, self.text, continues=continues)
            try:
                continued = await while_there(request.receive, exchange.open())
            except BaseException:
                exchange.close()
                raise
        headers = {CACHE_HEADER: "continued" if continued else "read"}
        if not streaming.stream:
            return await self._whole(request.receive, exchange, headers)
        usage = streaming.stream_options is not None and bool(streaming.stream_options.include_usage)
        return EventStream(self._events(exchange, include_usage=usage), exchange, headers)

    async def _whole(self, receive: Receive, exchange: Exchange, headers: Mapping[str, str]) -> Response:
        async def all_of_it() -> None:
            while await exchange.next() is not None:
                pass

        try:
            await while_there(receive, all_of_it())
        finally:
            exchange.close()
        body = self.recorder.body(exchange.item, exchange.answers, self.text)
        return Response(encode(body), media_type="application/json", headers=dict(headers))

    async def _events(self, exchange: Exchange, *, include_usage: bool) -> AsyncIterator[Record]:
        chunks = Chunks(self.recorder, exchange.item, self.text, include_usage=include_usage)
        for chunk in chunks.opening():
            yield chunk
        ends: list[Record] = []  # of choices; the last of them says more
        while (heard := await exchange.next()) is not None:
            pieces = chunks.piece(*heard)
            if heard[1].finish_reason is not None:
                ends.append(pieces.pop())
            for chunk in (*ends[:-1], *pieces):
                yield chunk
            del ends[:-1]
        for chunk in chunks.closing(ends[-1], exchange.answers):
            yield chunk


class Gone(Exception):
    """End a request whose client is gone."""


class EventStream(Response):
    """Send chunks as server-sent events while the client is there; an error is the last of them."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[Record], exchange: Exchange, headers: Mapping[str, str]) -> None:
        super().__init__(headers={**headers, "cache-control": "no-store", "x-accel-buffering": "no"})
        self._events = events
        self._exchange = exchange

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        raw = [(key, value) for key, value in self.raw_headers if key != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        with suppress(Gone):
            try:
                await while_there(receive, self._send_all(send))
            finally:
                self._exchange.close()

    async def _send_all(self, send: Send) -> None:
        async def event(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more})

        try:
            async for chunk in self._events:
                await event(encode(chunk).rstrip(b"\n"))
        except Exception as error:  # noqa: BLE001  the status has been sent: a stream can only say it
            await event(orjson.dumps(ApiError.of(error).to_json()), more=False)
        else:
            await event(b"[DONE]", more=False)


async def while_there(receive: Receive, work: Awaitable[T]) -> T:
    """Do the work unless the client goes away.

    Raises:
        Gone: it has; the work was cancelled.
    """
    doing = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((doing, watching), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise Gone
        return doing.result()
    finally:
        for task in (doing, watching):
            task.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _take_streaming(data: Any) -> Streaming:
    """Take the keys of streaming out of a body; of something else than an object there are none."""
    if not isinstance(data, dict):
        return Streaming()
    said = {key: data.pop(key) for key in Streaming.model_fields if key in data}
    try:
        streaming = Streaming.model_validate(said)
    except ValidationError as error:
        (param, message), *_ = explain(error)
        raise ApiError(400, message, param=param) from None
    if streaming.stream_options is not None and not streaming.stream:
        raise ApiError(400, "stream_options: needs stream to be true", param="stream_options")
    unknown = () if streaming.stream_options is None else streaming.stream_options.extras()
    data |= {f"stream_options.{key}": value for key, value in unknown}  # which says or refuses them like any other
    return streaming
