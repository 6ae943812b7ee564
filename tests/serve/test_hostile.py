"""Mistakes that bodies, headers and connections of every kind bring out: a 500, a server that stands still."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.fake_engine import FakeText
from helpers.serving import SAID, Endpoint, Scripted, endpoint
from trimkv_cli.jobs.bodies import HARMLESS, IDLE, Body
from trimkv_cli.jobs.lines import Rules
from trimkv_cli.serve import server

EXAMPLES = int(os.environ.get("TRIMKV_TEST_FUZZED", "250"))
NAMES = frozenset({"mini"})
KEYS = sorted({*Body.model_fields, *HARMLESS, *IDLE, "stream", "stream_options", "unknown"})
NUMBERS = (
    st.integers() | st.integers(-3, 200) | st.floats() | st.sampled_from([2**63, -(2**63), 2**64, 10**400, 1e308, -0.0])
)
PLAIN = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
ANYTHING = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "", "User"]) | PLAIN
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text") | PLAIN, "text": PLAIN}) | ANYTHING, max_size=3)
MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": st.text() | PARTS | ANYTHING}) | ANYTHING
GOOD = st.just(SAID) | st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=20)}),
    min_size=1,
    max_size=4,
)
KNOWN: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(-1, 20),
    "n": st.integers(0, 5),
    "seed": st.integers(-(2**64), 2**64),
    "temperature": st.floats(-1, 3),
    "top_p": st.floats(0, 1),
    "stop": st.lists(st.text(max_size=2), max_size=5) | st.text(max_size=2),
    "logit_bias": st.dictionaries(st.integers(-1, 10**7).map(str) | st.text(max_size=3), st.floats(-101, 101)),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "logprobs": st.booleans() | st.integers(-1, 21),
    "top_logprobs": st.integers(-1, 21),
    "prompt": st.text(max_size=20) | st.lists(st.integers(-1, 10**7), max_size=5),
    "messages": GOOD | st.lists(MESSAGE, max_size=3),
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema"])},
        optional={"json_schema": st.fixed_dictionaries({"schema": ANYTHING}) | ANYTHING},
    ),
}
PAIRS = st.sampled_from(KEYS).flatmap(
    lambda key: st.tuples(st.just(key), KNOWN.get(key, ANYTHING) | ANYTHING if key in KNOWN else ANYTHING)
)
OBJECTS = st.builds(
    lambda base, pairs: {**base, **dict(pairs)},
    st.fixed_dictionaries({"max_tokens": st.just(3)}, optional={"messages": GOOD, "prompt": st.just("ab")}),
    st.lists(PAIRS, max_size=4),
)


def lax_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


BODIES = (
    OBJECTS.map(lax_json)
    | ANYTHING.map(lax_json)
    | st.binary(max_size=64)
    | st.builds(
        lambda body, at, more: body[:at] + more, OBJECTS.map(lax_json), st.integers(0, 80), st.binary(max_size=4)
    )
)
PATHS = st.sampled_from(["/v1/chat/completions"] * 4 + ["/v1/completions"] * 3 + ["/v1/models", "/health", "/metrics"])
HEADERS = st.lists(
    st.tuples(
        st.sampled_from([b"host", b"content-length", b"content-type", b"authorization", b"origin", b"accept", b"x-a"]),
        st.binary(max_size=20)
        | st.sampled_from([b"evil.example", b"-1", b"\xb2", b"9" * 30, b"Bearer a b", b"chunked"]),
    ),
    max_size=3,
)


async def call(app: Any, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes) -> tuple[int, bytes]:
    """Call an application as a server does; return status and body."""
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]
    sent: list[Any] = []
    ended = asyncio.Event()

    async def receive() -> Any:
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode("utf-8", "surrogatepass"), "root_path": "", "scheme": "http", "query_string": b"",
        "headers": headers, "server": ("127.0.0.1", 1), "client": ("127.0.0.1", 2), "state": {},
    }  # fmt: skip
    await asyncio.wait_for(app(scope, receive, send), 20)
    assert not sent[-1].get("more_body", False)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def check(served: Endpoint, body: bytes, path: str, headers: list[tuple[bytes, bytes]], method: str) -> int:
    """Send one request; it is answered or refused, and never the server's own fault."""
    hosts = [] if any(name == b"host" for name, _ in headers) else [(b"host", b"localhost")]
    status, said = asyncio.run(call(served.app, method, path, [*hosts, *headers], body))
    assert status < 500, (status, said)
    if status == 200 and said.startswith(b"data: "):
        assert said.endswith(b"data: [DONE]\n\n")
        assert b'data: {"error"' not in said
    if status >= 400 and method != "HEAD":
        error = json.loads(said)["error"]
        assert error["message"]
        assert error.keys() == {"message", "type", "param", "code"}
    return status


@pytest.fixture(scope="module")
def served() -> Iterator[Endpoint]:
    with endpoint(lambda: Scripted(max_rows=8), max_body_bytes=20_000, kept=0, rules=Rules(model_names=NAMES)) as made:
        yield made


@settings(max_examples=EXAMPLES, derandomize=True, database=None)
@given(
    body=BODIES,
    path=PATHS,
    headers=HEADERS,
    method=st.sampled_from(["POST"] * 6 + ["GET", "PUT", "HEAD", "OPTIONS", "X"]),
)
def test_whatever_is_sent_is_answered_or_refused(
    served: Endpoint, body: bytes, path: str, headers: list[tuple[bytes, bytes]], method: str
) -> None:
    """Catch a 500. For a night: TRIMKV_TEST_FUZZED=10000."""
    check(served, body, path, headers, method)


DEEP = b"[" * 5000 + b"]" * 5000


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "JSON"),
        (b"null", "JSON object, not null"),
        (b"[]", "JSON object, not an array"),
        (b'{"messages": ', "JSON"),
        (b"\xff\xfe{}", "UTF-8"),
        (b'\xef\xbb\xbf{"prompt": 1}', "JSON"),
        (b'{"messages": ' + DEEP + b"}", "JSON"),
        (b'{"temperature": NaN, "messages": [{"role": "user", "content": "a"}]}', "temperature"),
        (b'{"temperature": Infinity, "messages": [{"role": "user", "content": "a"}]}', "temperature"),
        (b'{"max_tokens": 1' + b"0" * 5000 + b', "messages": [{"role": "user", "content": "a"}]}', "JSON"),
        (b'{"max_tokens": 1' + b"0" * 30 + b', "messages": [{"role": "user", "content": "a"}]}', "max_tokens"),
        (b'{"seed": 1e999, "messages": [{"role": "user", "content": "a"}]}', "seed"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "JSON"),
        (b'{"messages": [{"role": "user", "content": {"a": 1}}]}', "messages[0].content"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}', "messages[0]"),
        (b'{"stream": "yes", "messages": [{"role": "user", "content": "a"}]}', "stream"),
        (b'{"stream_options": {}, "messages": [{"role": "user", "content": "a"}]}', "stream_options"),
        (b'{"messages": "x"}', "messages"),
        (b'{"prompt": "a"}', "messages"),
    ],
)
def test_a_bad_body_is_told_what_is_wrong(served: Endpoint, body: bytes, said: str) -> None:
    """Catch a refusal that does not say why."""
    response = served.client.post("/v1/chat/completions", content=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_of_a_key_said_twice_the_last_counts_as_everywhere(served: Endpoint) -> None:
    """Catch a check that sees another value than what runs."""
    body = b'{"max_tokens": 0, "max_tokens": 2, "messages": [{"role": "user", "content": "ab"}]}'
    response = served.client.post("/v1/chat/completions", content=body)
    assert response.json()["usage"]["completion_tokens"] == 2


def test_nothing_is_passed_over_without_a_word(served: Endpoint) -> None:
    """Catch a key that a client believes in and nobody reads."""
    body = {"max_tokens": 1, "temperatur": 0, "model": "gpt-9", "user": "me", "stream_options": {"include_usage": True}}
    stream = served.chat(**body, stream=True).text
    assert "temperatur" in stream
    del body["stream_options"]
    warnings = served.chat(**body).json()["trimkv"]["warnings"]
    assert [warning["code"] for warning in warnings] == ["unknown_key", "foreign_model"]
    with endpoint(rules=Rules(strict=True, model_names=NAMES)) as strict:
        for key, value, status in (("temperatur", 0, 400), ("model", "gpt-9", 404)):
            refused = strict.chat(**{key: value})
            assert (refused.status_code, refused.json()["error"]["param"]) == (status, key)
        refused = strict.chat(stream=True, stream_options={"include_usag": True})
        assert refused.status_code == 400
        assert strict.chat(max_tokens=1, model="mini").status_code == 200


def test_a_text_that_no_row_holds_is_not_encoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catch 16 MiB of text that become gigabytes of tokens before they are refused."""
    lengths: list[int] = []
    encode = FakeText.encode

    def noted(text: FakeText, said: str, **more: Any) -> list[int]:
        lengths.append(len(said))
        return encode(text, said, **more)

    monkeypatch.setattr(FakeText, "encode", noted)
    with endpoint(lambda: Scripted(max_positions=100_000), max_body_bytes=1 << 24) as served:
        refused = served.client.post("/v1/completions", json={"prompt": "a" * 10_000_000})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert sum(lengths) < 200_000
        assert served.chat([{"role": "user", "content": "a" * 300_000}]).status_code == 400
        assert max(lengths) < 100_000
    with endpoint(lambda: Scripted(max_positions=400_000), max_body_bytes=1 << 24) as served:
        assert served.chat([{"role": "user", "content": "a" * 300_000}], max_tokens=1).status_code == 200


def test_what_is_not_there_is_told(served: Endpoint) -> None:
    """Catch pages of HTML, and a method that does something else."""
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/embeddings", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("BREW", "/v1/models", 405),
    ):
        response = served.client.request(method, path)
        assert response.status_code == status, path
        assert response.json()["error"]["message"]


def talk(served: Endpoint, data: bytes) -> bytes:
    """Send bytes, and read until the server closes the connection."""
    said = b""
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as opened:
        try:
            opened.sendall(data)
            while piece := opened.recv(65536):
                said += piece
        except ConnectionError:
            pass  # it has closed before all was sent
    return said


def post(body: bytes, *headers: str, length: int | None = None, version: str = "1.1", then: str = "close") -> bytes:
    lines = [f"POST /v1/chat/completions HTTP/{version}", "Host: localhost", f"Connection: {then}", *headers]
    if "Transfer-Encoding: chunked" not in headers:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


GOOD_BODY = b'{"max_tokens": 2, "messages": [{"role": "user", "content": "ab"}]}'


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (post(GOOD_BODY), b"200"),
        (post(GOOD_BODY, version="1.0"), b"200"),
        (post(GOOD_BODY, "Expect: 100-continue"), b"200"),
        (post(b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD_BODY), GOOD_BODY), "Transfer-Encoding: chunked"), b"200"),
        (post(b"4e20\r\n" + b" " * 20_000 + b"\r\n1\r\n \r\n0\r\n\r\n", "Transfer-Encoding: chunked"), b"413"),
        (post(b"", length=10**9), b"413"),
        (post(b"", length=10**18), b"413"),
        (post(GOOD_BODY, length=-1), b"400"),
        (post(GOOD_BODY, "Content-Length: 3"), b"400"),
        (post(GOOD_BODY, length=len(GOOD_BODY) - 1), b"400"),
        (post(b"zz\r\n", "Transfer-Encoding: chunked"), b"400"),
        (b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}", b"403"),
        (b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", b"403"),
        (b"GET /health HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 600_000 + b"\r\n\r\n", b"400"),
        (b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b"404"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),
        (b"hello\r\n\r\n", b"400"),
    ],
)  # fmt: skip
def test_what_comes_over_a_connection_is_answered_or_refused(served: Endpoint, data: bytes, status: bytes) -> None:
    """Catch headers that lie, and programs that speak something else."""
    said = talk(served, data).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").removeprefix(b"HTTP/1.1 100 \r\n\r\n")
    assert said.split(b" ", 2)[1] == status, said[:300]
    if status != b"200":
        assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert served.chat(max_tokens=1).status_code == 200


def test_requests_sent_ahead_are_answered_in_turn(served: Endpoint) -> None:
    """Catch answers of pipelined requests that are lost or mixed up."""
    other = GOOD_BODY.replace(b'"ab"', b'"xy"').replace(b"2", b"3")
    bodies = (GOOD_BODY, other, b"{")
    said = talk(served, b"".join(post(body, then="keep-alive") for body in bodies) + post(GOOD_BODY))
    assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"200", b"200", b"400", b"200"]
    assert said.index(b'"\\u0000a"') < said.index(b'"\\u0000xy"')


def test_connections_that_never_finish_a_request_are_closed(served: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catch a few hundred half-open connections that use up what a process may open."""
    monkeypatch.setattr(server, "_HEADER_S", 0.3)
    halves = [b"", b"POST /v1/chat", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"]
    opened = [socket.create_connection(("127.0.0.1", served.port), timeout=10) for _ in halves]
    for connection, half in zip(opened, halves, strict=True):
        connection.sendall(half)
    assert served.chat(max_tokens=1).status_code == 200
    for connection in opened:
        started = time.monotonic()
        assert connection.recv(1) == b""
        assert time.monotonic() - started < 5
        connection.close()
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        slow.settimeout(0.05)
        started = time.monotonic()
        while True:  # a byte now and then is no request
            try:
                slow.sendall(b"X")
                if slow.recv(1) == b"":
                    break
            except TimeoutError:
                pass
            except OSError:
                break
            assert time.monotonic() - started < 5
