"""Mistakes that would let a file's name, its text or a model's answer drive the terminal."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import platformdirs
import pytest

from trimkv_cli.app import _exit_code
from trimkv_cli.errors import ConfigError
from trimkv_cli.model.profiles import read_profile
from trimkv_cli.ui.plain import AnswerWriter, to_json

CONTROLS = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")
EVIL = "\x1b[2J\x9b31m\x07\x7f"
SHORT = ("-n", "3", "--greedy", "--threads", "1")
Run = Callable[..., tuple[int, bytes, bytes]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path) -> Run:
    monkeypatch.setattr(platformdirs, "user_config_path", lambda _: tmp_path / "config")
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> tuple[int, bytes, bytes]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        capfdbinary.readouterr()
        code = _exit_code(list(arguments))
        sys.stdout.flush()
        shown = capfdbinary.readouterr()
        return code, shown.out, shown.err

    return invoke


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask", "hi", "-f", f"no{EVIL}file"),
        ("ask", "hi", "-m", f"no{EVIL}model", "--offline"),
        ("ask", "hi", "-t", f"no{EVIL}template"),
        ("ask", "hi", "--cache", f"no{EVIL}cache", *SHORT),
        ("ask", "hi", f"--no{EVIL}flag"),
        ("ask", "hi", "--kv-budget", f"4{EVIL}"),
        ("summarize", f"no{EVIL}file"),
        ("summarize", f"*{EVIL}*"),
        ("plan", f"no{EVIL}model"),
        ("models", "show", f"no{EVIL}model"),
        ("profiles", "show", f"no{EVIL}profile"),
        ("gates", "show", f"no{EVIL}gates"),
        (f"no{EVIL}command",),
    ],
)
def test_errors_quote_no_control_character(arguments: tuple[str, ...], run: Run) -> None:
    """Catches an error line that clears the screen."""
    code, out, err = run(*arguments)
    assert code in (2, 6)
    assert not CONTROLS.search(out + err)


def test_names_and_texts_of_files_come_out_visible(run: Run, tmp_path: Path) -> None:
    """Catches a title, a JSON object, a picture or a page with a control character of the input."""
    for name in (f"a{EVIL}.txt", "b.txt"):
        (tmp_path / name).write_text(f"Note 1: {EVIL} the cat.")
    code, out, err = run("summarize", f"a{EVIL}.txt", "b.txt", *SHORT)
    assert code == 0
    assert "a␛[2J".encode() in out
    assert not CONTROLS.search(out + err)
    code, out, _ = run("summarize", f"a{EVIL}.txt", "--json", *SHORT)
    assert not CONTROLS.search(out)
    assert json.loads(out)["trimkv"]["input"] == f"a{EVIL}.txt"
    code, out, _ = run("inspect", EVIL, "--html", "page.html", "--svg", "look.svg", *SHORT)
    assert code == 0
    for name in ("page.html", "look.svg"):
        assert not CONTROLS.search((tmp_path / name).read_bytes())
    code, out, _ = run("inspect", EVIL, *SHORT)
    assert not CONTROLS.search(out)


def test_json_escapes_what_text_output_replaces() -> None:
    """Catches a DEL or C1 character that JSON lets through, and one that is lost."""
    assert not CONTROLS.search(to_json({"a": EVIL}).encode())
    assert json.loads(to_json({"a": EVIL})) == {"a": EVIL}
    stream = io.BytesIO()
    AnswerWriter(stream).line(to_json([EVIL]))
    assert json.loads(stream.getvalue()) == [EVIL]


def test_a_profile_may_not_have_code_loaded(tmp_path: Path) -> None:
    """Catches a profile, which may come with a project, that switches on what a project may not."""
    path = tmp_path / "x.toml"
    path.write_text('model = "a/b"\ntrust_remote_code = true\n')
    with pytest.raises(ConfigError, match="trust_remote_code"):
        read_profile(path)
