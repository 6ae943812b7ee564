"""Catches commands that write over what they read, or two results into one file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import platformdirs
import pytest

from trimkv_cli.app import _exit_code, command_tree
from trimkv_cli.commands.options import READ, WRITTEN, check_outputs

TEXT = "My cat is called Zubo.\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with one document under three names; nothing is ever loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(platformdirs, "user_config_path", lambda _: tmp_path / "user")
    monkeypatch.setattr("trimkv_cli.loading.sources.find_source", None)
    (tmp_path / "a.txt").write_text(TEXT)
    Path("soft.txt").symlink_to("a.txt")
    os.link("a.txt", "hard.txt")
    (tmp_path / "user" / "templates").mkdir(parents=True)
    os.link("a.txt", tmp_path / "user" / "templates" / "mine.txt")
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "summarize a.txt -o a.txt",
        "summarize a.txt -o soft.txt",
        "summarize soft.txt -o a.txt",
        "summarize a.txt -o hard.txt",
        "summarize *.txt -o a.txt",
        "summarize a.txt --save-cache ./user/../a.txt",
        "ask hi -f a.txt -o a.txt",
        "ask hi -f other.txt -f a.txt -o a.txt",
        "ask hi --system-file a.txt -o hard.txt",
        "ask hi -t mine -o a.txt",
        "ask hi -t ./a.txt -o a.txt",
        "ask hi --cache a.txt -o a.txt",
        "run a.txt -o a.txt",
        "run a.txt -o out.jsonl --summary-json a.txt",
        "inspect hi -f a.txt --html a.txt",
        "inspect hi --system-file a.txt --svg soft.txt",
        "inspect --cache a.txt --png a.txt",
        "inspect --prompt-token-ids a.txt --html a.txt",
        "eval mini --data a.txt --plot a.txt",
    ],
)
def test_nothing_is_written_over_what_is_read(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(line.split()) == 2
    error = capsys.readouterr().err
    assert "would overwrite what is read" in error
    assert "hint: give -" in error
    assert Path("a.txt").read_text() == TEXT


@pytest.mark.parametrize(
    "line",
    [
        "summarize a.txt -o new --save-cache new",
        "summarize a.txt -o new --save-cache ./new",
        "run a.txt -o new --summary-json new",
        "run a.txt -o new --summary-json new.trimkv.json",
        "inspect hi --html new --svg new",
    ],
)
def test_no_two_results_go_into_one_file(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(line.split()) == 2
    assert "are the same file" in capsys.readouterr().err


def test_a_file_that_is_stdin_is_an_input(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("a.txt").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        before = os.dup(0)
        os.dup2(stdin.fileno(), 0)
        try:
            assert _exit_code(["ask", "hi", "-o", "soft.txt"]) == 2
        finally:
            os.dup2(before, 0)
            os.close(before)
    assert "stdin is the same file" in capsys.readouterr().err


def test_devices_may_be_named_twice() -> None:
    output, summary = (param for param in command_tree().commands["run"].params if param.name in WRITTEN)
    check_outputs([output, summary], {"output": "/dev/null", "summary_json": "/dev/null"})


def test_every_option_for_a_file_is_known_as_input_or_output() -> None:
    """Catches a new option whose file nobody compares with the others."""
    commands = {
        (name, inner): command
        for name, group in command_tree().commands.items()
        for inner, command in getattr(group, "commands", {"": group}).items()
    }
    options = {
        (*path, param.name, str(param.metavar)) for path, command in commands.items() for param in command.params
    }
    files = {option for option in options if any(word in option[-1] for word in ("FILE", "KV", "INPUT"))}
    assert len(files) > 15
    assert {name for *_, name, _ in files} <= {*READ, *WRITTEN}
