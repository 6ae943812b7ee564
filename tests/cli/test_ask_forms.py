"""Mistakes of `ask` in scripts: JSON lines, code blocks, templates, several files, names in a shell's completion."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import platformdirs
import pytest

from helpers.programs import COMMAND, ENVIRONMENT
from trimkv_cli.app import _exit_code
from trimkv_cli.chat.store import TRANSCRIPT
from trimkv_cli.commands.documents import Reader
from trimkv_cli.commands.prompts import fill, read_template
from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.ui.fences import code_blocks

Run = Callable[..., tuple[int, str, str]]
SHORT = ("-n", "8", "--greedy", "--ignore-eos", "--threads", "1")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes], tmp_path: Path) -> Run:
    """Run a command in this process; the user's configuration lies in tmp_path/config."""
    monkeypatch.setattr(platformdirs, "user_config_path", lambda _: tmp_path / "config")
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str | Path, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capfdbinary.readouterr()
        code = _exit_code([str(argument) for argument in arguments])
        sys.stdout.flush()
        shown = capfdbinary.readouterr()
        return code, shown.out.decode(), shown.err.decode()

    return invoke


def test_json_lines_are_the_answer_in_pieces(run: Run) -> None:
    """Catches pieces that do not add up to the answer, and an end without usage or what it cost."""
    code, out, _ = run("ask", "hello", "--stream-json", *SHORT)
    chunks = [json.loads(line) for line in out.splitlines()]
    whole = json.loads(run("ask", "hello", "--json", *SHORT)[1])
    assert code == 0
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["trimkv"].keys() == whole["trimkv"].keys()
    assert run("ask", "x", "--json", "-x")[0] == 2


def test_only_the_code_is_printed(run: Run) -> None:
    """Catches fences in the output, another block, and prose that a shell would run."""
    text = "Take this:\n\n```sh\necho 1\n\n  ```not the end\n```\n\n```\nsecond\n```\n"
    assert code_blocks(text)[0] == "echo 1\n\n  ```not the end"
    assert code_blocks("~~~~\na\n~~~\n~~~~\n") == ["a\n~~~"]
    assert code_blocks("```py\ncut off") == ["cut off"]
    assert code_blocks("no `code` here") == []
    assert code_blocks(
        "Use ```x``` here.\n\n1. so:\n\n     ```sh\n     a\n       b\n     ```\n~~~\nc\n```\n~~~\n```\ncut"
    ) == [
        "a\n  b",
        "c\n```",
        "cut",
    ]
    code, out, err = run("ask", "hello", "-x", *SHORT)
    assert (code, out) == (1, "")
    assert "no code block" in err


def test_templates_take_the_prompt_and_parameters(run: Run, tmp_path: Path) -> None:
    """Catches a template that is looked for elsewhere, places left open, and a prompt that goes nowhere."""
    folder = tmp_path / "config" / "templates"
    folder.mkdir(parents=True)
    (folder / "translate.txt").write_text("Say in $language for $$1: $input")
    template = read_template("translate", Reader())
    assert fill(template, name="t", user="hi", parameters=["language=German=x"]) == "Say in German=x for $1: hi"
    for user, parameters, said in (("hi", [], "-p language"), ("", ["language=x"], "prompt"), ("a", ["b=c"], "places")):
        with pytest.raises(UsageError) as caught:
            fill(template, name="t", user=user, parameters=parameters)
        assert said in (caught.value.hint or "")
    with pytest.raises(InputError, match="no template 'nope'") as unknown:
        read_template("nope", Reader())
    assert unknown.value.hint == "there are translate"
    (tmp_path / "own.txt").write_text("only 5$")
    with pytest.raises(InputError, match="names no place"):
        read_template(str(tmp_path / "own.txt"), Reader())
    code, out, _ = run("ask", "-t", "translate", "-p", "language=German", *SHORT, "--json", stdin="a cat")
    assert code == 0
    rendered = json.loads(run("ask", "Say in German for $1: a cat", *SHORT, "--json")[1])
    assert json.loads(out)["usage"] == rendered["usage"]
    assert run("ask", "x", "-p", "a=b", *SHORT)[0] == 2


def test_several_files_of_any_kind_are_one_prompt(run: Run, tmp_path: Path) -> None:
    """Catches a second -f that takes the place of the first, and markup that is sent along."""
    (tmp_path / "a.html").write_text("<html><body><p>one</p></body></html>")
    (tmp_path / "b.txt").write_text("two")
    both = json.loads(run("ask", "say", "-f", "a.html", "-f", "b.txt", "--json", *SHORT)[1])
    plain = json.loads(run("ask", "say\n\none\n\ntwo", "--json", *SHORT)[1])
    assert both["usage"] == plain["usage"]
    assert both["choices"] == plain["choices"]


def test_without_a_length_an_answer_takes_what_is_left(run: Run) -> None:
    """Catches a refusal of 512 tokens that nobody asked for, and a shorter answer without a word."""
    code, out, err = run("ask", "hello", "-c", "40", "--json", "--greedy", "--ignore-eos")
    assert code == 0
    assert json.loads(out)["usage"]["total_tokens"] == 41  # the last token is never fed
    assert "positions are left for the answer, of 40" in err
    code, _, err = run("ask", "hello", "-c", "40", "-n", "512")
    assert code == 4
    assert "mini has 40 (its own: 65536)" in err


@pytest.mark.parametrize(
    ("shell", "line", "expected"),
    [
        ("bash", "trimkv ask -m min", "mini"),
        ("bash", "trimkv plan qwen3-1", "qwen3-1.7b-math"),
        ("zsh", "trimkv summ", "summarize"),
        ("fish", "trimkv ask --gates str", "streaming"),
        ("fish", "trimkv sessions show my-", "my-talk"),
    ],
)
def test_a_shell_completes_names_without_torch(shell: str, line: str, expected: str, tmp_path: Path) -> None:
    """Catches completion that is not there, knows no names, or takes seconds for torch."""
    words = line.split()
    session = tmp_path / "trimkv" / "sessions" / "my-talk"
    session.mkdir(parents=True)
    (session / TRANSCRIPT).touch()
    environment = {
        **ENVIRONMENT,
        "HF_HUB_CACHE": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path),
        "_TRIMKV_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(
        [COMMAND[0], "-X", "importtime", *COMMAND[1:]], capture_output=True, env=environment, timeout=60, check=False
    )
    assert expected in done.stdout.decode()
    assert not re.search(rb"\|\s+(torch|transformers)\n", done.stderr)
