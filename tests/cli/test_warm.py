"""`trimkv ask` through a running server, and what lists, starts and ends servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.programs import COMMAND, ENVIRONMENT, Run, trimkv
from trimkv_cli.commands.summarize.remote import Asking
from trimkv_cli.commands.summarize.sheet import Summed
from trimkv_cli.commands.warm import Said, Server
from trimkv_cli.errors import ContextOverflow
from trimkv_cli.loading.options import EngineOptions, SamplingOptions
from trimkv_cli.request import SamplingParams
from trimkv_cli.serve.about import About, said_by, stamp
from trimkv_cli.serve.client import Client
from trimkv_cli.serve.notes import Note, noted, process_start, running

_KEY = "k-123"
_ABOUT = About(
    model="mini",
    said=said_by(EngineOptions(budget="2GiB")),
    resolved={
        "kv_budget": 64,
        "prefill_chunk": 512,
        "dtype": "fp32",
        "kv_dtype": "fp32",
        "quantize": "none",
        "device": "cpu",
    },
    budget_bytes=2 << 30,
    in_thought={"auto": False},
)


@contextmanager
def _server(folder: Path, *arguments: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Start a server in the background; yields its URL and the environment in which it is found."""
    folder.chmod(0o700)
    places = {"XDG_RUNTIME_DIR": str(folder), "XDG_STATE_HOME": str(folder / "state")}
    places["XDG_DATA_HOME"] = str(folder / "data")
    started = trimkv("serve", "--detach", "--threads", "1", "--port", "0", *arguments, environment=places)
    assert started.returncode == 0, started.stderr
    try:
        yield started.stdout.decode().strip(), places
    finally:
        trimkv("stop", "--now", environment=places)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    with _server(tmp_path_factory.mktemp("warm"), "--api-key", _KEY, "-b", "2GiB") as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("My cat is called Zubo. What is my cat called?", "--greedy"),
        ("Tell me more", "-s", "Be kind.", "--seed", "7", "--temperature", "1.5", "-n", "9", "--stop", "xyz"),
        ("--raw", "The dog and", "--seed", "8", "--temperature", "2", "-n", "12", "--ignore-eos", "--top-h", "0.9"),
    ],
)
def test_an_answer_is_the_one_without_a_server(
    server: tuple[str, dict[str, str]], here: Run, arguments: tuple[str, ...]
) -> None:
    """Catch sampling, stop strings or a system message that the way through a server loses or changes."""
    warm = trimkv("ask", *arguments, "--stats", environment=server[1])
    alone = here("ask", *arguments, "--server", "off", "--threads", "1")
    assert f"server   {server[0]}" in warm.stderr.decode()
    assert (warm.returncode, warm.stdout) == (0, alone.stdout)


@pytest.mark.slow
def test_a_record_is_the_one_without_a_server(server: tuple[str, dict[str, str]], here: Run) -> None:
    """Catch a key of `--json` that goes missing through a server, or counts that are another request's."""
    words = ("ask", "Hello", "--json", "--seed", "3", "--temperature", "1", "-b", "3GiB")
    warm = json.loads(trimkv(*words, environment=server[1]).stdout)
    alone = json.loads(here(*words, "--server", "off", "--threads", "1").stdout)
    assert warm["trimkv"].pop("server") == server[0]
    assert warm.keys() == alone.keys()
    assert warm["trimkv"].keys() == alone["trimkv"].keys()
    for key in ("choices", "usage"):
        assert warm[key] == alone[key]
    for key in ("model", "gates", "sampling", "warnings"):
        assert warm["trimkv"][key] == alone["trimkv"][key]
    assert warm["trimkv"]["budget"] == {"requested": "2GiB", "bytes": 2 << 30, "kv_budget": 64, "honoured": True}


@pytest.mark.slow
def test_summaries_are_those_without_a_server(
    server: tuple[str, dict[str, str]], here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catch a prompt that is another one, summaries out of order, and a broken file that stops the others."""
    monkeypatch.chdir(tmp_path)
    for index in range(3):
        text = f"My cat is called Zubo. The box is in room {index}.\n" * (9 - 2 * index)
        (tmp_path / f"{index}.txt").write_text(text)
    (tmp_path / "broken.txt").write_bytes(b"\x89PNG\0\0")
    for words in (("*.txt", "--length", "short"), ("1.txt", "--raw"), ("*.txt", "--combine", "--format", "json")):
        line = ("summarize", *words, "-n", "9", "--seed", "4", "--temperature", "1.5")
        warm = here(*line, "--server", server[0], environment=server[1])
        alone = here(*line, "--server", "off", "--threads", "1")
        assert (warm.returncode, warm.stdout) == (alone.returncode, alone.stdout)
        assert warm.returncode == (0 if "--raw" in words else 3)
        assert (b"broken.txt is binary" in warm.stderr) == (b"broken.txt is binary" in alone.stderr)


@pytest.mark.slow
def test_a_record_of_a_summary_is_the_one_without_a_server(
    server: tuple[str, dict[str, str]], here: Run, tmp_path: Path
) -> None:
    """Catch keys and counts that go missing through a server."""
    (tmp_path / "a.txt").write_text("My cat is called Zubo. " * 9)
    line = ("summarize", tmp_path / "a.txt", "--json", "--greedy", "--seed", "1", "-n", "4")
    warm = json.loads(here(*line, environment=server[1]).stdout)
    alone = json.loads(here(*line, "--server", "off", "--threads", "1").stdout)
    assert warm["trimkv"].pop("server") == server[0]
    assert (warm["id"], warm["choices"], warm["usage"]) == (alone["id"], alone["choices"], alone["usage"])
    assert warm["trimkv"].keys() == alone["trimkv"].keys()
    for key in ("input", "parts", "rounds", "sampling"):
        assert warm["trimkv"][key] == alone["trimkv"][key]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("-n", "100000"), 4, "--on-overflow map-reduce (part by part"),
        (("--save-cache", "x.kv"), 2, "--save-cache: a server does not"),
        (("--live",), 2, "--live: a server does not"),
        (("--on-overflow", "map-reduce"), 2, "--on-overflow is map-reduce here, and error at the server"),
    ],
)
def test_what_a_named_server_cannot_summarize(
    server: tuple[str, dict[str, str]], here: Run, tmp_path: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    """Catch an option of `summarize` that a named server passes over."""
    (tmp_path / "a.txt").write_text("My cat is called Zubo.")
    done = here("summarize", tmp_path / "a.txt", "--server", server[0], *arguments, environment=server[1])
    assert (done.returncode, done.stdout) == (code, b"")
    assert said in done.stderr.decode()


def test_a_summary_without_room_is_refused() -> None:
    """Catch a summary of a few tokens, cut off, of a text that fills the positions."""
    chunk = {
        "choices": [{"index": 0, "delta": {"content": "It"}, "finish_reason": "length"}],
        "usage": {"completion_tokens": 1},
        "trimkv": {"warnings": [{"code": "max_tokens_reduced", "message": ""}]},
    }
    said = Said("", _ABOUT, SamplingParams())
    said.take(chunk)
    asking = Asking(
        server=Server(url="", api_key=None, about=_ABOUT),
        instruction="",
        raw=False,
        think=None,
        sampling=SamplingOptions(),
        quiet=True,
        stats=False,
    )
    assert isinstance(asking.summed(said, "a.txt"), ContextOverflow)
    said.finish_reason = "stop"
    assert isinstance(asking.summed(said, "a.txt"), Summed)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("ask", "Hello"), ("summarize", "-")])
def test_nothing_heavy_is_imported(server: tuple[str, dict[str, str]], words: tuple[str, str]) -> None:
    """Catch an import on the way to a server that costs more than the answer."""
    script = (
        f"import sys; from trimkv_cli.app import _exit_code; code = _exit_code([*{words}, '-n', '3']);"
        "print(*sorted({'torch', 'transformers', 'jinja2', 'starlette', 'httpx', 'numpy'} & {*sys.modules}));"
        "sys.exit(code)"
    )
    environment = {**ENVIRONMENT, **server[1]}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, check=False, input=b"Hello"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(b"\n\n"), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("-n", "100000"), 4, "positions"),
        (("--api-key", "wrong"), 2, "TRIMKV_API_KEY"),
        (("-m", "smollm2-135m-instruct"), 2, "--model is smollm2-135m-instruct here, and mini at the server"),
        (("--kv-budget", "32"), 2, "--kv-budget is 32 here"),
        (("-b", "1GiB"), 2, "--budget is 1GiB here, and 2GiB at the server"),
    ],
)
def test_what_a_named_server_cannot_do(
    server: tuple[str, dict[str, str]], arguments: tuple[str, ...], code: int, said: str
) -> None:
    """Catch an option that a named server passes over, or an error that gets another exit code there."""
    done = trimkv("ask", "Hello", "--server", server[0], *arguments, environment=server[1])
    assert (done.returncode, done.stdout) == (code, b"")
    assert said in done.stderr.decode()


@pytest.mark.slow
def test_ctrl_c_ends_the_request_at_the_server(server: tuple[str, dict[str, str]]) -> None:
    """Catch an answer that a server goes on writing for nobody."""
    words = ["ask", "--raw", "The dog", "--ignore-eos", "-n", "20000"]
    asking = subprocess.Popen(
        [*COMMAND, *words],
        env={**ENVIRONMENT, **server[1]},
        stdout=subprocess.PIPE,
        # A test run in the background ignores SIGINT, and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    assert asking.stdout is not None
    assert asking.stdout.read(1)
    _wait(lambda: _health(server[0])["running"] == 1)
    asking.send_signal(signal.SIGINT)
    asking.communicate()  # a pipe that is closed would end it otherwise
    assert asking.returncode == 130
    _wait(lambda: not _health(server[0])["running"])


@pytest.mark.slow
def test_servers_are_listed_and_ended(server: tuple[str, dict[str, str]]) -> None:
    """Catch a list without memory or rows, and an end that needs to be told which of one server."""
    url, places = server
    (found,) = json.loads(trimkv("ps", "--json", environment=places).stdout)
    assert (found["url"], found["model"], found["answers"], found["loaded"]) == (url, "mini", True, True)
    assert 0 < found["resident_bytes"] < found["budget_bytes"] == 2 << 30
    assert "mini" in trimkv("ps", environment=places).stdout.decode()
    wrong = trimkv("stop", "1", environment=places)
    assert (wrong.returncode, f"hint: trimkv stop {url.rpartition(':')[2]}" in wrong.stderr.decode()) == (2, True)


@pytest.mark.slow
def test_a_failure_in_the_background_comes_through(tmp_path: Path) -> None:
    """Catch a start that failed and says 0, or nothing."""
    done = trimkv("serve", "/no/such/model", "--port", "0", "--detach", environment={"XDG_STATE_HOME": str(tmp_path)})
    assert (done.returncode, done.stdout) == (6, b"")
    assert done.stderr.decode().startswith("error: ")


@pytest.mark.slow
def test_an_idle_model_gives_its_memory_back(tmp_path: Path) -> None:
    """Catch memory, or threads, that stay or grow when a model is given up and loaded again; a question loads it."""
    body = {"stream": True, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    with _server(tmp_path, "--idle", "0.3s", "--kept", "0") as (url, _):
        (note,) = (tmp_path / "trimkv").glob("serve-*.json")
        process = psutil.Process(json.loads(note.read_text())["pid"])
        seen = []
        for _ in range(6):
            assert [*Client(url).stream("/v1/chat/completions", body, headers={})]
            _wait(lambda: not _health(url)["loaded"])
            seen.append((process.memory_info().rss, process.num_threads()))
    earlier, later = ([rss for rss, _ in part] for part in (seen[:3], seen[3:]))
    assert min(later) < max(earlier) + (8 << 20)  # the model and its cache take more
    assert seen[5][1] == seen[1][1]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (EngineOptions(), None),
        (EngineOptions(model="mini", threads=7, offline=True, device="cpu", max_inflight=3), None),
        (EngineOptions(budget="2GiB"), None),
        (EngineOptions(budget="3GiB", kv_budget="64", prefill_chunk=512), None),
        (EngineOptions(dtype="fp32", quantize="none"), None),
        (EngineOptions(dtype="fp32"), "dtype"),
        (EngineOptions(budget="1GiB"), "budget"),
        (EngineOptions(budget="80%"), "budget"),
        (EngineOptions(profile="smollm2-135m-instruct"), "model"),
        (EngineOptions(gates="streaming"), "gates"),
        (EngineOptions(kv_budget="32"), "kv_budget"),
        (EngineOptions(prefill_chunk=0), "prefill_chunk"),
        (EngineOptions(pin="recent:8"), "pin"),
        (EngineOptions(context=4096), "context"),
        (EngineOptions(on_overflow="rebase"), "on_overflow"),
        (EngineOptions(deterministic=True), "deterministic"),
        (EngineOptions(quantize="int8"), "quantize"),
        (EngineOptions(device="cuda"), "device"),
    ],
)
def test_every_option_that_decides_answers_is_compared(options: EngineOptions, flag: str | None) -> None:
    """Catch a server that is taken although it would answer otherwise."""
    assert next((name for name, _ in _ABOUT.differences(options)), None) == flag


def test_what_a_budget_made_smaller_is_meant_only_when_it_is_said() -> None:
    """Catch a server with fewer slots than this command would have."""
    tight = replace(_ABOUT, reduced=["kv_budget"])
    assert [flag for flag, _ in tight.differences(EngineOptions())] == ["kv_budget"]
    assert not [*tight.differences(EngineOptions(kv_budget="64"))]


def test_a_model_that_has_changed_is_another(tmp_path: Path) -> None:
    """Catch answers of weights that have been trained anew since."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    about = replace(_ABOUT, stamps={str(tmp_path): stamp(str(tmp_path))})
    assert not [*about.differences(EngineOptions())]
    os.utime(weights, ns=(0, stamp(str(tmp_path)) + 10**9))
    assert [*about.differences(EngineOptions())]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where notes lie."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "trimkv").mkdir(0o700)
    return tmp_path / "trimkv"


def test_a_note_is_there_while_its_server_is(folder: Path) -> None:
    """Catch notes that others may read, that stay, or that another process with the number is taken for."""
    note = Note.of(url="http://127.0.0.1:1", api_key=_KEY, about=_ABOUT)
    with noted(note):
        (path,) = folder.iterdir()
        assert path.stat().st_mode & 0o777 == 0o600
        assert running() == [note]
    assert not [*folder.iterdir()]
    with noted(replace(note, started="earlier")):
        assert not running()
        assert not [*folder.iterdir()]  # swept


@pytest.mark.parametrize(
    "text",
    ["", "garbage", "[]", '{"pid": "1"}', "9" * 5000, "[" * 100_000, '{"pid": -1, "started": "", "url": "http://a:1"}'],
)
def test_a_note_that_is_none_is_passed_over(folder: Path, text: str) -> None:
    """Catch a damaged file that ends every command."""
    path = folder / "serve-1.json"
    path.touch(0o600)
    path.write_text(text)
    assert not running()


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_notes_of_others_are_not_believed(folder: Path) -> None:
    """Catch a prompt that is sent to a server which somebody else put there."""
    with noted(Note.of(url="http://127.0.0.1:1", api_key=None, about=_ABOUT)):
        (path,) = folder.iterdir()
        path.chmod(0o644)
        assert not running()
        path.chmod(0o600)
        folder.chmod(0o777)
        assert not running()
        folder.chmod(0o700)
        elsewhere = path.rename(folder.parent / "elsewhere")
        path.symlink_to(elsewhere)
        assert not running()


class _Scripted(BaseHTTPRequestHandler):
    """Answer every question with the server's `script`: a status and what follows, then break off."""

    def do_GET(self) -> None:
        self._send(200, b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._send(*self.server.script)  # type: ignore[attr-defined]
        self.close_connection = True

    def _send(self, status: int, body: bytes, missing: int = 0) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def _scripted(*script: Any) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Scripted) as http:
        http.script = script  # type: ignore[attr-defined]
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}"
        with noted(Note.of(url=url, api_key=None, about=replace(_ABOUT, said=said_by(EngineOptions())))):
            yield url
        http.shutdown()


def _chunk(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode() + b"\n\n"


@pytest.mark.slow
def test_a_server_that_dies_before_the_first_token_is_done_without(folder: Path, here: Run) -> None:
    """Catch a question that stays without an answer because a server ended at that moment."""
    with _scripted(200, _chunk(""), 10) as url:
        done = here("ask", "Hello", "--greedy", "--threads", "1")
        assert (done.returncode, done.stdout) == (0, b"That is good.\n")
        named = here("ask", "Hello", "--server", url)
        assert (named.returncode, named.stdout) == (2, b"")  # it does not say what it is


@pytest.mark.parametrize(
    ("script", "code", "out", "said"),
    [
        ((200, _chunk("Once upon"), 10), 1, b"Once upon", "hint: "),
        ((429, b'{"error": {"message": "9 requests wait", "code": "too_many_requests"}}'), 1, b"", "--server off"),
        ((503, b"not JSON"), 1, b"", "status 503"),
        (
            (200, _chunk("A") + b'data: {"error": {"message": "no room", "code": "out_of_memory"}}\n\n'),
            5,
            b"A",
            "no room",
        ),
    ],
)
def test_what_a_server_says_ends_with_its_exit_code(
    folder: Path, here: Run, script: tuple[Any, ...], code: int, out: bytes, said: str
) -> None:
    """Catch half an answer that passes for a whole one, and a refusal that looks like an answer."""
    with _scripted(*script):
        done = here("ask", "Hello")
    assert (done.returncode, done.stdout.strip()) == (code, out)
    assert said in done.stderr.decode()


def test_without_or_with_several_servers_stop_says_what_to_do(folder: Path, here: Run) -> None:
    """Catch a server that is ended although another one was meant."""
    none = here("stop")
    assert (none.returncode, b"trimkv serve --detach" in none.stderr) == (1, True)
    note = Note.of(url="http://127.0.0.1:1", api_key=None, about=_ABOUT)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        second = replace(note, pid=other.pid, started=process_start(other.pid) or "", url="http://127.0.0.1:2")
        with noted(note), noted(second):
            several = here("stop")
            assert (several.returncode, b"1 (mini), 2 (mini)" in several.stderr) == (2, True)
            assert b"does not answer" in here("ps").stdout
            assert other.poll() is None
    finally:
        other.communicate()


def _health(url: str) -> Any:
    client = Client(url)
    try:
        return client.get("/health")
    finally:
        client.close()


def _wait(for_what: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not for_what():
        assert time.monotonic() < end
        time.sleep(0.05)
