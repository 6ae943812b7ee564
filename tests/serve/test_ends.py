"""Mistakes at the ends of a server's life: a port that is taken, a model that is not there, signals."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from helpers.programs import trimkv
from helpers.serving import SAID, Served, served, settled

PROGRAM = (sys.executable, "-m", "helpers.serve_program")


class Listener:
    """A client that reads a stream in a thread."""

    def __init__(self, server: Served, max_tokens: int) -> None:
        self.lines: list[str] = []
        self.error: Exception | None = None
        self._body = {"messages": SAID, "stream": True, "max_tokens": max_tokens}
        self._url = f"{server.url}/v1/chat/completions"
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        while len(self.lines) < 3:
            time.sleep(0.005)

    def _read(self) -> None:
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=30) as response:
                self.lines += (line for line in response.iter_lines() if line)
        except httpx.HTTPError as error:
            self.error = error

    def join(self) -> list[Any]:
        """Wait for the end, and return the events."""
        self._thread.join(30)
        assert not self._thread.is_alive()
        said = [line.removeprefix("data: ") for line in self.lines]
        return [each if each == "[DONE]" else orjson.loads(each) for each in said]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, "--grace", "20s", command=PROGRAM) as found:
        yield found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_what_runs_end(server: Served, number: int) -> None:
    """Catch answers that are cut, new requests that are taken, and an exit code that says failure."""
    listener = Listener(server, 60)
    code, said = server.end(number)
    events = listener.join()
    assert listener.error is None
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert code == 0, said
    assert "Traceback" not in said
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_what_does_not_end_in_time_is_told_so(tmp_path: Path) -> None:
    """Catch a server that waits for ever, and streams that stop without a word."""
    with served(tmp_path, "--grace", "0.3s", command=PROGRAM) as server:
        listener = Listener(server, 900)
        started = time.monotonic()
        code, said = server.end(signal.SIGTERM)
        assert time.monotonic() - started < 8
        events = listener.join()
        assert listener.error is None
        assert events[-1]["error"]["code"] == "server_closing"
        assert code == 0, said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(server: Served, number: int, code: int) -> None:
    """Catch a server that cannot be ended while somebody reads."""
    listener = Listener(server, 900)
    server.process.send_signal(number)
    time.sleep(0.3)
    assert server.process.poll() is None
    started = time.monotonic()
    assert server.end(number)[0] == code
    assert time.monotonic() - started < 5
    listener.join()
    assert listener.error is not None or "[DONE]" not in listener.lines


def test_an_idle_server_ends_at_once_however_many_are_connected(server: Served) -> None:
    """Catch a server that waits for connections on which nothing is asked."""
    with socket.create_connection(("127.0.0.1", server.port)), httpx.Client() as client:
        client.get(f"{server.url}/health")
        started = time.monotonic()
        code, said = server.end(signal.SIGTERM)
    assert code == 0, said
    assert time.monotonic() - started < 5


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(server: Served) -> None:
    """Catch a minute of loading for a port that is not to be had, and two servers that share one."""
    done = trimkv("serve", "mini", "--port", str(server.port))
    assert done.returncode == 2
    said = done.stderr.decode()
    assert f"port {server.port} of 127.0.0.1 cannot be taken" in said
    assert f"--port {server.port + 1}" in said
    assert settled(server.metrics, lambda now: now["loaded"] == 1)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("/no/such/folder", "--port", "0"), 6, "/no/such/folder"),
        (("mini", "--port", "0", "--host", "no.such.host.invalid"), 2, "--host no.such.host.invalid"),
        (("mini", "--port", "0", "--on-overflow", "map-reduce"), 2, "map-reduce"),
    ],
)
def test_what_cannot_be_served_is_told_at_the_start(arguments: tuple[str, ...], code: int, said: str) -> None:
    """Catch a server that starts all the same, or a traceback."""
    done = trimkv("serve", *arguments)
    error = done.stderr.decode()
    assert done.returncode == code, error
    assert said in error
    assert "hint:" in error
    assert "Traceback" not in error
