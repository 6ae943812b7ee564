"""Models that come from a hub over HTTP: whole, resumed, refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.gguf_files import write_gguf
from helpers.other_gates import write_fastkvzip, write_kvzap
from helpers.programs import ENVIRONMENT
from helpers.stub_hub import COMMIT, Hub, serve
from trimkv_cli.mini import MODEL_FOLDER
from trimkv_cli.model.folders import read_model_spec


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub()) as running:
        yield running


def asking(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """Return an environment in which the hub is asked, with a cache of its own."""
    return {
        **ENVIRONMENT,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }


def trimkv(hub: Hub, tmp_path: Path, *arguments: str, timeout: int = 180) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, "-m", "trimkv_cli", *arguments], asking(hub, tmp_path)
    return subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=timeout
    )


def test_a_model_is_pulled_once_and_answers_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    """Catches files that are asked for again, and a model that needs the network although it is here."""
    hub.add("some/mini", MODEL_FOLDER)
    pulled = trimkv(hub, tmp_path, "models", "pull", "some/mini")
    assert (pulled.returncode, COMMIT in pulled.stdout) == (0, True), pulled.stderr
    asked = len(hub.asked)
    answered = trimkv(hub, tmp_path, "ask", "-m", "some/mini", "--greedy", "-n", "8", "-q", "My cat is called Zubo.")
    assert answered.returncode == 0, answered.stderr
    assert len(hub.asked) == asked
    assert "no_gates" not in answered.stderr
    assert "some/mini has no retention gates" in answered.stderr
    listed = trimkv(hub, tmp_path, "models", "list")
    assert "some/mini" in listed.stdout


def test_a_gguf_file_is_found_by_its_quantisation(hub: Hub, tmp_path: Path) -> None:
    """Catches a download of all files of a repository, and a name that is not told."""
    for kind in ("Q8_0", "Q4_0"):
        write_gguf(tmp_path / f"tiny-{kind}.gguf", "llama", kind=kind)
        hub.add("some/Tiny-GGUF", tmp_path / f"tiny-{kind}.gguf")
    made = trimkv(hub, tmp_path, "models", "pull", "some/Tiny-GGUF:q4_0")
    assert made.returncode == 0, made.stderr
    assert Path(made.stdout.strip()).name == "tiny-Q4_0.gguf"
    assert not any("Q8_0" in path for method, path, _ in hub.asked if method == "GET" and "resolve" in path)
    asked = trimkv(
        hub, tmp_path, "ask", "-m", "some/Tiny-GGUF:tiny-Q4_0.gguf", "--raw", "the quick", "-n", "3", "--greedy", "-q"
    )
    assert asked.returncode == 0, asked.stderr
    which = trimkv(hub, tmp_path, "ask", "-m", "some/Tiny-GGUF", "hi")
    assert (which.returncode, "some/Tiny-GGUF:Q4_K_M" in which.stderr) == (6, True)
    missing = trimkv(hub, tmp_path, "ask", "-m", "some/Tiny-GGUF:Q6_K", "hi")
    assert (missing.returncode, "tiny-Q8_0.gguf" in missing.stderr) == (6, True)


def test_a_download_that_was_cut_is_whole_in_the_end(hub: Hub, tmp_path: Path) -> None:
    """Catches half a file that is taken for one, and bars of a terminal in a pipe."""
    hub.add("some/mini", MODEL_FOLDER)
    hub.cut_once.add("model.safetensors")
    pulled = trimkv(hub, tmp_path, "models", "pull", "some/mini")
    assert pulled.returncode == 0, pulled.stderr
    folder = Path(pulled.stdout.strip().splitlines()[0])
    assert (folder / "model.safetensors").read_bytes() == (MODEL_FOLDER / "model.safetensors").read_bytes()
    assert "\r" not in pulled.stderr


def test_a_file_that_arrives_damaged_is_not_used(hub: Hub, tmp_path: Path) -> None:
    """Catches weights that are loaded although they are not those that the hub names."""
    hub.add("some/mini", MODEL_FOLDER)
    hub.damaged.add("model.safetensors")
    pulled = trimkv(hub, tmp_path, "models", "pull", "some/mini")
    assert (pulled.returncode, "model.safetensors of some/mini arrived damaged" in pulled.stderr) == (6, True)
    hub.damaged.clear()
    again = trimkv(hub, tmp_path, "models", "pull", "some/mini")
    assert again.returncode == 0, again.stderr
    folder = Path(again.stdout.strip().splitlines()[0])
    assert (folder / "model.safetensors").read_bytes() == (MODEL_FOLDER / "model.safetensors").read_bytes()


def test_what_the_hub_refuses_is_told_with_what_to_do(hub: Hub, tmp_path: Path) -> None:
    """Catches a traceback of HTTP, and a hint that does not help."""
    hub.add("some/gated", MODEL_FOLDER)
    hub.gated.add("some/gated")
    said = {
        "some/gated": ("licence", "HF_TOKEN"),
        "some/nothing": ("there is no model some/nothing", "hint:"),
    }
    for name, words in said.items():
        ended = trimkv(hub, tmp_path, "models", "pull", name)
        assert ended.returncode == 6, ended.stderr
        assert all(word in ended.stderr for word in words), ended.stderr
        assert "Traceback" not in ended.stderr
    hub.add("some/mini", MODEL_FOLDER)
    revision = trimkv(hub, tmp_path, "models", "pull", "some/mini", "--revision", "nope")
    assert (revision.returncode, "no revision nope" in revision.stderr) == (6, True), revision.stderr
    offline = trimkv(hub, tmp_path, "ask", "-m", "some/mini", "--offline", "hi")
    assert (offline.returncode, "not in the cache" in offline.stderr) == (6, True)


_TOGETHER = """
import contextlib, io, json, sys
from trimkv_cli.app import _exit_code
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = _exit_code(command)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def together(hub: Hub, tmp_path: Path, *commands: str) -> list[tuple[int, str, str]]:
    """Run commands one after the other in one process; return what each ended with, said and told."""
    words = json.dumps([command.split() for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", _TOGETHER, words],
        cwd=tmp_path,
        env=asking(hub, tmp_path),
        capture_output=True,
        check=True,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_gates_of_others_come_alone(hub: Hub, tmp_path: Path) -> None:
    """Catches gates of all models fetched for one, a model's weights fetched as gates, and gates told as a model."""
    spec = read_model_spec(MODEL_FOLDER)
    write_fastkvzip(tmp_path / "fast/mini", spec)
    write_fastkvzip(tmp_path / "fast/other-3b", spec)
    write_kvzap(tmp_path / "zap", spec)
    hub.add("Jang-Hyun/Fast-KVzip", tmp_path / "fast")
    hub.add("nvidia/KVzap-mlp-mini", tmp_path / "zap")
    hub.add("some/mini", MODEL_FOLDER)
    pulled, fits, shown, missing, which, model, listed = together(
        hub,
        tmp_path,
        "models pull Jang-Hyun/Fast-KVzip:mini",
        "gates verify Jang-Hyun/Fast-KVzip -m mini --offline",
        "gates show nvidia/KVzap-mlp-mini",
        "gates show Jang-Hyun/Fast-KVzip:tiny-9b",
        "gates show Jang-Hyun/Fast-KVzip",
        "gates show some/mini",
        "models list",
    )
    assert [path.suffix for path in Path(pulled[1].strip()).iterdir()] == [".pt"]
    assert fits[:1] == (0,), fits
    assert fits[1].startswith("ok: Jang-Hyun/Fast-KVzip:mini (fastkvzip) fits mini: ")
    fetched = [path for method, path, _ in hub.asked if method == "GET" and "resolve" in path]
    assert not any("other-3b" in path or ("some/mini" in path and "safetensors" in path) for path in fetched)
    assert (shown[0], "kvzap, " in shown[1]) == (0, True), shown
    for (code, _, told), words in {
        missing: "has no gates for tiny-9b",
        which: "several",
        model: "holds no gates",
    }.items():
        assert (code, words in told) == (6, True), told
    rows = [line.split()[:2] for line in listed[1].splitlines()]
    assert [name for name, kind in rows if kind == "gates"] == ["Jang-Hyun/Fast-KVzip", "nvidia/KVzap-mlp-mini"]
