"""Mistakes of `summarize`'s flags: files that are left out of --combine, JSON that is none, overflow paths that cut."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trimkv_cli.app import _exit_code

SHORT = ("-n", "8", "--greedy", "--ignore-eos", "--threads", "1", "-m", "mini")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path) -> Run:
    """Run summarize in this process, in a folder with two texts and a picture."""
    monkeypatch.chdir(tmp_path)
    for index in range(2):
        (tmp_path / f"{index}.txt").write_text(f"Note 1: the box is in room {index}. We walked along the river.\n" * 18)
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\0\0")

    def invoke(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capfdbinary.readouterr()
        code = _exit_code(["summarize", *arguments, *SHORT])
        sys.stdout.flush()
        shown = capfdbinary.readouterr()
        return code, shown.out.decode(), shown.err.decode()

    return invoke


def test_combined_files_are_one_text(run: Run) -> None:
    """Catches a file that is left out, and a broken one that is not counted."""
    code, out, err = run("*.txt", "--combine", "--json")
    record = json.loads(out)
    assert code == 3
    assert "picture.txt is binary" in err
    assert "1 of 3 files failed" in err
    assert record["trimkv"]["input"] == "0.txt, 1.txt"
    single = [json.loads(run(name, "--json")[1])["usage"]["prompt_tokens"] for name in ("0.txt", "1.txt")]
    assert max(single) < record["usage"]["prompt_tokens"] < sum(single) + 20
    assert run("picture.txt", "--combine")[0] == 2


def test_every_form_is_what_it_says(run: Run) -> None:
    """Catches output that a program cannot read, and a wish that never reaches the model."""
    code, out, _ = run("0.txt", "1.txt", "--format", "json")
    assert code == 0
    assert [set(json.loads(line)) for line in out.splitlines()] == [{"input", "points"}] * 2
    plain, focused = (json.loads(run("0.txt", "--json", *more)[1])["usage"] for more in ((), ("--focus", "the box")))
    assert focused["prompt_tokens"] > plain["prompt_tokens"]
    text = Path("0.txt").read_text(encoding="utf-8")
    assert run("-", stdin=text)[1] == run("0.txt")[1]


def test_both_ways_past_the_end_say_what_they_did(run: Run) -> None:
    """Catches a text that is cut, usage that counts one part alone, and parts that are kept as one reading."""
    room = ("-c", "320", "--prefill-chunk", "64")
    code, out, err = run("0.txt", *room)
    assert (code, out) == (4, "")
    assert "--on-overflow map-reduce" in err
    assert "--on-overflow rebase" in err
    whole = json.loads(run("0.txt", "--json")[1])["usage"]["prompt_tokens"]
    rebased = json.loads(run("0.txt", "--json", *room, "--on-overflow", "rebase")[1])
    assert rebased["usage"]["prompt_tokens"] == whole
    assert rebased["trimkv"]["parts"] == 1
    _, out, err = run("0.txt", "--json", "--stats", *room, "--on-overflow", "map-reduce")
    reduced = json.loads(out)
    assert reduced["trimkv"]["parts"] > 1
    assert reduced["usage"]["prompt_tokens"] > whole
    read, written = reduced["usage"]["prompt_tokens"], reduced["usage"]["completion_tokens"]
    assert f"tokens   {read} prompt + {written} generated" in err
    assert "tokens kept per head in the last pass" in err
    assert run("0.txt", "--save-cache", "x.kv", "--on-overflow", "map-reduce")[0] == 2
