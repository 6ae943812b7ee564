"""Mistakes in whom a server answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest
from starlette.types import Receive, Scope, Send

from trimkv_cli.commands.serve import ServeOptions
from trimkv_cli.errors import UsageError
from trimkv_cli.serve.guard import Guard


def ask(
    *headers: tuple[str, str], path: str = "/v1/models", api_key: str | None = None, hosts: frozenset[str] = frozenset()
) -> int:
    """Return the status; 200 when the application is reached."""
    sent: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"error": {"message": ""}}'})

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    scope = {"type": "http", "path": path, "headers": raw}
    asyncio.run(Guard(app=app, hosts=hosts, api_key=api_key)(scope, receive, send))
    start, body = sent
    assert "message" in orjson.loads(body["body"])["error"]
    return int(start["status"])


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8012", 200),
        ("LocalHost.:8012", 200),
        ("app.localhost", 200),
        ("127.0.0.1:1", 200),
        ("127.8.9.1", 200),
        ("[::1]:8012", 200),
        ("[::1]", 200),
        ("mine.example:80", 200),
        ("evil.example", 403),
        ("evil.example:8012", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("notlocalhost", 403),
        ("192.168.0.2", 403),
        ("[::ffff:8.8.8.8]", 403),
        ("", 403),
        ("[", 403),
        (":8012", 403),
        ("localhost@evil.example", 403),
        ("\xe9", 403),
    ],
)
def test_without_a_key_only_names_of_this_machine_are_answered(host: str, status: int) -> None:
    """Catch a page that has its own name point here, and asks for whatever it likes (DNS rebinding)."""
    assert ask(("Host", host), hosts=frozenset({"mine.example"})) == status
    assert ask(("Host", host), path="/health", hosts=frozenset({"mine.example"})) == status


def test_no_host_at_all_is_no_name_of_this_machine() -> None:
    """Catch HTTP/1.0 that walks past the check."""
    assert ask() == 403


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer secret", 200),
        ("bearer  secret ", 200),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer Secret", 401),
        ("Bearer secret2", 401),
        ("Basic secret", 401),
        ("secret", 401),
        ("", 401),
        ("Bearer \xff\xfe", 401),
        ("Bearer " + "x" * 60_000, 401),
    ],
)
def test_with_a_key_it_is_what_counts(header: str, status: int) -> None:
    """Catch a key that is nearly right, a header that breaks the check, and a Host that is asked for beside a key."""
    assert ask(("Host", "any.example"), ("Authorization", header), api_key="secret") == status


def test_no_key_at_all_is_refused_and_health_needs_none() -> None:
    """Catch an open server, and a probe that needs a secret."""
    assert ask(api_key="secret") == 401
    assert ask(api_key="secret", path="/health") == 200
    assert ask(api_key="secret", path="/healthy") == 401
    assert ask(api_key="secret", path="/metrics") == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.2", "mine.example", ""])
def test_an_address_that_others_reach_needs_a_key(host: str) -> None:
    """Catch a model that a whole network can use since somebody typed 0.0.0.0."""
    with pytest.raises(UsageError, match="no key") as caught:
        ServeOptions(host=host).key()
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("--api-key ")
    assert ServeOptions(host=host, api_key="k").key() == "k"


@pytest.mark.parametrize("key", ["", " ", "é", "a\nb"])
def test_a_key_that_no_header_can_hold_is_refused(key: str) -> None:
    """Catch an empty file that makes a server open to all who bring nothing."""
    with pytest.raises(UsageError, match="API key"):
        ServeOptions(api_key=key).key()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"port": 65536}, "--port 65536"),
        ({"max_body": "much"}, "much"),
        ({"grace": "soon"}, "soon"),
        ({"idle": "-1s"}, "-1s"),
        ({"api_key": "a", "api_key_file": "b"}, "both given"),
    ],
)
def test_an_option_that_means_nothing_is_refused(option: dict[str, Any], said: str) -> None:
    """Catch a limit that is none."""
    with pytest.raises(UsageError, match=said):
        ServeOptions(**option)


def test_a_key_comes_from_a_file(tmp_path: Path) -> None:
    """Catch the end of its line taken for a part of it, and a file that is not there."""
    (tmp_path / "key").write_text("secret\n")
    assert ServeOptions(api_key_file=str(tmp_path / "key")).key() == "secret"
    with pytest.raises(UsageError, match="--api-key-file"):
        ServeOptions(api_key_file=str(tmp_path / "other")).key()
