"""Mistakes between the engine's thread and a client: lost or endless news, clients that are gone, slow or silent."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import orjson
import pytest
from starlette.requests import Request

from helpers.serving import SAID, Scripted, endpoint
from trimkv_cli.events import TokenEvent
from trimkv_cli.jobs.records import Record
from trimkv_cli.serve import bodies
from trimkv_cli.serve.bodies import Bodies
from trimkv_cli.serve.completions import EventStream, Gone, while_there
from trimkv_cli.serve.errors import ApiError
from trimkv_cli.serve.exchange import Begun, Mailbox
from trimkv_cli.serve.worker import WorkerOptions

Message = dict[str, Any]
LONG = {"max_tokens": 1000}


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 20))


def test_news_from_another_thread_come_in_their_order_and_none_is_lost() -> None:
    """Catch a reader that sleeps while news lie there."""

    async def work() -> None:
        mailbox = Mailbox(10_000)
        news = [TokenEvent(request_id="a", token_ids=(number,)) for number in range(5000)]
        thread = threading.Thread(target=lambda: [mailbox.put(3, each) for each in news])
        thread.start()
        assert [await mailbox.get() for _ in news] == [(3, each) for each in news]
        thread.join()

    run(work)


def test_a_mailbox_is_bounded_but_the_last_news_arrive() -> None:
    """Catch memory that a client's silence takes, and a client that never hears why it was ended."""

    async def work() -> None:
        mailbox = Mailbox(2)
        assert [mailbox.put(0, Begun(continued=False)) for _ in range(4)] == [True, True, False, False]
        mailbox.close(ApiError(503, "over"))
        assert [type(news) for _, news in [await mailbox.get() for _ in range(3)]] == [Begun, Begun, ApiError]

    run(work)


def test_news_for_a_loop_that_has_ended_are_refused() -> None:
    """Catch the engine's thread dying of a server that was stopped."""
    mailboxes: list[Mailbox] = []

    async def work() -> None:
        mailboxes.append(Mailbox())

    run(work)
    assert not mailboxes[0].put(0, Begun(continued=False))


class Closed:
    """An exchange, as far as a stream knows it."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def stream(events: AsyncIterator[Record], *, leaves: bool = False) -> tuple[list[Message], Closed]:
    """Send a stream to a client that stays, or leaves at once."""
    sent: list[Message] = []
    exchange = Closed()

    async def receive() -> Message:
        if not leaves:
            await asyncio.sleep(30)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)
        await asyncio.sleep(0)

    run(lambda: EventStream(events, exchange, {"x-trimkv-cache": "read"})({}, receive, send))  # type: ignore[arg-type]
    return sent, exchange


def test_a_stream_ends_with_done_and_has_no_length() -> None:
    """Catch a stream that a client waits on, or that a proxy keeps."""

    async def events() -> AsyncIterator[Record]:
        yield {"text": "a\u2028b"}

    (start, *pieces), exchange = stream(events())
    headers = dict(start["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert b"content-length" not in headers
    assert [piece["body"] for piece in pieces] == [b'data: {"text":"a\\u2028b"}\n\n', b"data: [DONE]\n\n"]
    assert [piece["more_body"] for piece in pieces] == [True, False]
    assert exchange.closed


@pytest.mark.parametrize("error", [ApiError(503, "memory ran out"), RuntimeError("a bug")])
def test_what_goes_wrong_in_a_stream_is_its_last_event(error: Exception) -> None:
    """Catch a stream that just stops, which a client takes for an answer."""

    async def events() -> AsyncIterator[Record]:
        yield {}
        raise error

    (_, *pieces), exchange = stream(events())
    assert str(error) in orjson.loads(pieces[-1]["body"].removeprefix(b"data: "))["error"]["message"]
    assert not pieces[-1]["more_body"]
    assert exchange.closed


def test_a_stream_whose_client_has_left_is_closed() -> None:
    """Catch a row that goes on for nobody."""

    async def events() -> AsyncIterator[Record]:
        while True:
            yield {}
            await asyncio.sleep(0.001)

    _, exchange = stream(events(), leaves=True)
    assert exchange.closed


def test_work_for_a_client_that_leaves_is_cancelled() -> None:
    """Catch work that goes on in the background."""
    ended = []

    async def work() -> None:
        async def endless() -> None:
            try:
                await asyncio.sleep(30)
            finally:
                ended.append(True)

        async def gone() -> Message:
            await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        with pytest.raises(Gone):
            await while_there(gone, endless())

    run(work)
    assert ended == [True]


def request(parts: Sequence[bytes | None], said: bytes | None = None) -> Request:
    """Make a request whose body comes in parts; after None nothing comes any more."""
    coming = iter(parts)

    async def receive() -> Message:
        part = next(coming)
        if part is None:
            await asyncio.sleep(30)
        return {"type": "http.request", "body": part, "more_body": part != parts[-1]}

    return Request({"type": "http", "headers": [] if said is None else [(b"content-length", said)]}, receive)


@pytest.mark.parametrize(("parts", "said", "status"), [
    ([b"12", b"34"], None, None),
    ([b"12", b"345"], None, 413),
    ([b"1234"], b"4", None),
    ([], b"5", 413),
    ([], b"9" * 19, 413),
    ([b"12"], "²".encode("latin-1"), None),
    ([b"ab"], b"2", 400),
    ([b"12", None], None, 408),
])  # fmt: skip
def test_a_body_is_bounded_whatever_is_said_of_it(
    parts: list[bytes | None], said: bytes | None, status: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catch a body without an end, in bytes or in time, and one that is refused only when it has been read."""
    monkeypatch.setattr(bodies, "_ARRIVES_S", 0.05)

    async def work() -> None:
        if status is None:
            async with Bodies(4).json(request(parts, said)) as body:
                assert body == int(b"".join(part or b"" for part in parts))
            return
        with pytest.raises(ApiError) as caught:
            async with Bodies(4).json(request(parts, said)):
                pass
        assert caught.value.status == status

    run(work)


def test_long_bodies_wait_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catch a budget that many large requests together break, room that one which is given up keeps, and a queue."""
    monkeypatch.setattr(bodies, "_SMALL", 1)
    read: list[int] = []
    leave = {number: asyncio.Event() for number in (11, 12, 13, 14, 5)}

    async def one(room: Bodies, number: int, *, told: bool = True) -> None:
        text = str(number).encode()
        async with room.json(request([text], str(len(text)).encode() if told else None)) as body:
            read.append(body)
            await leave[number].wait()

    async def work() -> None:
        room = Bodies(4)
        tasks = [asyncio.create_task(one(room, number)) for number in (11, 12, 13)]
        tasks += [asyncio.create_task(one(room, 14, told=False)), asyncio.create_task(one(room, 5))]
        await asyncio.sleep(0.01)
        assert read == [11, 12, 5]
        tasks[0].cancel()
        await asyncio.sleep(0.01)
        assert read == [11, 12, 5, 13]
        leave[12].set()
        await asyncio.sleep(0.01)
        assert read == [11, 12, 5, 13], "of how many bytes it is not told"
        leave[13].set()
        await asyncio.sleep(0.01)
        assert read == [11, 12, 5, 13, 14]
        for event in leave.values():
            event.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(work)


def half(port: int, *, streamed: bool) -> socket.socket:
    """Ask for a long answer, and read none of it."""
    body = orjson.dumps({"messages": SAID, "stream": streamed, **LONG})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    opened = socket.create_connection(("127.0.0.1", port))
    opened.sendall(head.encode() + body)
    return opened


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_its_row_and_its_place(streamed: bool) -> None:
    """Catch rows that answer nobody, while it runs and while it waits."""
    with endpoint(lambda: Scripted(max_rows=1, step_s=0.01), options=WorkerOptions(most_waiting=1)) as served:
        runs = half(served.port, streamed=streamed)
        served.settled(lambda now: now["requests_running"] == 1)
        waits = half(served.port, streamed=streamed)
        served.settled(lambda now: now["requests_waiting"] == 1)
        refused = served.chat(stream=streamed)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        waits.close()
        served.settled(lambda now: now["requests_waiting"] == 0)
        runs.close()
        served.settled(lambda now: now["requests_running"] == 0)
        assert served.chat(max_tokens=3).json()["choices"][0]["message"]["content"] == "\0ab"
        assert max(served.engine.made.values()) < 1000


def test_a_client_that_does_not_read_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catch a reader that stands still and holds its row, and memory without a bound."""
    monkeypatch.setattr(Mailbox.__init__, "__defaults__", (50,))
    long = [{"role": "user", "content": "x" * 4000}]
    with endpoint(lambda: Scripted(max_rows=1, max_positions=10_000)) as served:
        body = orjson.dumps({"messages": long, "stream": True, "logprobs": False, "max_tokens": 1000, "n": 3})
        opened = socket.socket()
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        opened.connect(("127.0.0.1", served.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        opened.sendall(head.encode() + body)
        served.settled(lambda now: now["requests_running"] + now["requests_waiting"] > 0)
        served.settled(lambda now: now["requests_running"] + now["requests_waiting"] == 0)
        said = b""
        while piece := opened.recv(1 << 16):
            said += piece
            if b"0\r\n\r\n" in said[-64:]:
                break
        opened.close()
        assert served.chat(max_tokens=2).status_code == 200
        assert b'"code":"slow_client"' in said or said.count(b'"finish_reason":"length"') == 3


def test_choices_of_one_request_run_beside_each_other_and_wait_for_rows() -> None:
    """Catch `n` above the rows that never ends, and choices that are mixed up."""
    with endpoint(lambda: Scripted(max_rows=2)) as served:
        body = served.chat(max_tokens=4, n=5).json()
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4]
        assert {choice["message"]["content"] for choice in body["choices"]} == {"\0abc"}
        assert body["usage"]["completion_tokens"] == 20
        assert served.chat(max_tokens=4, n=128).status_code == 200
        refused = served.chat(max_tokens=4, n=129)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
