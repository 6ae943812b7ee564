"""`trimkv chat` at a running server, on a pseudo-terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from helpers.programs import trimkv
from helpers.terminals import CTRL_C, CTRL_D, ENTER, Terminal
from trimkv_cli.chat.conversation import Conversation
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import SamplingParams
from trimkv_cli.serve.client import Client

pytestmark = pytest.mark.slow
CHAT = ("chat", "--kv-budget", "64", "-n", "24", "--temperature", "1.5", "--seed", "7")
TEXTS = ("My cat is called Zubo.", "What is my cat called?", "Tell me more.")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the URL of a server, and where it is found."""
    folder = tmp_path_factory.mktemp("warm")
    folder.chmod(0o700)
    places = {"XDG_RUNTIME_DIR": str(folder), "XDG_STATE_HOME": str(folder / "state")}
    words = ("serve", "--detach", "--threads", "1", "--port", "0", "--kv-budget", "64")
    started = trimkv(*words, environment=places)
    assert started.returncode == 0, started.stderr
    yield started.stdout.decode().strip(), places
    trimkv("stop", "--now", environment=places)


def stored(home: Path) -> Any:
    """Return the newest session."""
    found = (home / "data" / "trimkv" / "sessions").glob("*/session.json")
    return json.loads(max(found, key=lambda path: path.stat().st_mtime_ns).read_bytes())


def test_turns_are_those_without_a_server(server: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """Catch answers that differ, turns that are read again, and a session that cannot go on there or lies with states.

    Nothing is evicted before the last turn ends: what differs would be the prompts or seeds.
    """
    with Terminal(*CHAT, home=tmp_path, environment=server[1]) as terminal:
        terminal.wait(lambda: terminal.asks)
        for text in TEXTS[:2]:
            terminal.send(text)
        terminal.send("/show model")
        assert f"server             {server[0]}" in terminal.text
        terminal.type(CTRL_D)
        assert terminal.wait_end() == 0
    with Terminal("chat", "-C", home=tmp_path, environment=server[1]) as terminal:
        terminal.wait(lambda: terminal.asks)
        terminal.send(TEXTS[2])
        terminal.type(CTRL_D)
        assert terminal.wait_end() == 0
    session = stored(tmp_path)
    llm = load_engine(EngineOptions(kv_budget="64", max_inflight=1, threads=1))
    params = SamplingParams(max_tokens=24, temperature=1.5, seed=7)
    alone = Conversation(llm, system=None, think=None, params=params, undo_depth=0)
    for text in TEXTS:
        list(alone.say(text, lambda: False))
    assert [turn["token_ids"] for turn in session["turns"]] == [list(turn.token_ids) for turn in alone.turns]
    for there, here in zip(session["turns"], alone.turns, strict=True):
        assert (there["first"], there["prompt_tokens"], there["seen"]) == (here.first, here.prompt_tokens, here.seen)
    assert session["states"] == {}
    assert session["options"] == {
        "model": "mini", "kv_budget": "64", "prefill_chunk": 512, "dtype": "fp32", "quantize": "none"
    }  # fmt: skip


def test_keys_and_commands(server: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """Catch an answer that Ctrl-C does not end at the server, and commands that break without a cache."""
    with Terminal(*CHAT[:3], "--greedy", "-n", "24", home=tmp_path, width=120, environment=server[1]) as terminal:
        terminal.wait(lambda: terminal.asks)
        terminal.send(TEXTS[0])
        for name in ("map", "why", "pin", "cache", "budget 32"):
            terminal.send(f"/{name}")
            assert f"error: /{name.split()[0]} needs --server off" in terminal.text
        terminal.send("/regen")
        terminal.send("/stats")
        assert "cache      20 of 20 tokens kept per head" in terminal.text
        terminal.send("/set max_tokens 9000")
        terminal.send("/set ignore_eos on")
        terminal.type("Hello" + ENTER)
        terminal.wait(lambda: " tok/s" in terminal.lines[terminal.screen.cursor.y])
        terminal.type(CTRL_C)
        terminal.wait(lambda: "\nstopped\n" in terminal.text and terminal.asks)
        ends = time.monotonic() + 60
        with closing(Client(server[0])) as client:
            while client.get("/health")["running"]:
                assert time.monotonic() < ends
        terminal.send("/continue")
        assert "error: /continue needs --server off" in terminal.text
        terminal.send("/undo")
        assert "makes the model read the turns again" in terminal.text
        terminal.send("/set max_tokens 8")
        terminal.send("/set ignore_eos off")
        terminal.send(TEXTS[1])
        assert "Your cat is called Zubo." in terminal.text
        terminal.type("/exit" + ENTER)
        assert terminal.wait_end() == 0
    assert "Traceback" not in terminal.text
    assert [turn["user"] for turn in stored(tmp_path)["turns"]] == list(TEXTS[:2])


def test_nothing_heavy_is_imported(
    server: tuple[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catch an import on the way to a server that keeps the first prompt waiting."""
    script = (
        "import sys; from trimkv_cli.app import _exit_code; _exit_code(sys.argv[1:]);"
        "print('heavy:', *sorted({'torch', 'transformers', 'jinja2', 'starlette', 'httpx', 'numpy'} & {*sys.modules}))"
    )
    monkeypatch.setattr("helpers.terminals.COMMAND", [sys.executable, "-c", script])
    with Terminal(*CHAT, home=tmp_path, environment=server[1]) as terminal:
        terminal.wait(lambda: terminal.asks)
        terminal.send("Hello")
        terminal.type(CTRL_D)
        terminal.wait_end()
    assert "heavy:\n" in terminal.text


def test_a_named_server_says_what_it_cannot_do(server: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """Catch an option that is passed over where a server was named."""
    with Terminal("chat", "--server", server[0], "--kv-budget", "32", home=tmp_path, environment=server[1]) as terminal:
        assert terminal.wait_end() == 2
    assert "error: http" in terminal.text
    assert "--kv-budget is 32 here" in terminal.text
