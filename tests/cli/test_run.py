"""Mistakes in the contracts of `trimkv run`: stdout, stderr, exit codes, signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.programs import Run

TextRun = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "CI": "1", "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "trimkv_cli", "run"]
SMALL = ["--model", "mini", "--kv-budget", "16", "--threads", "1"]


def trimkv_run(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=ENVIRONMENT,
        timeout=120,
        check=False,
    )


@pytest.fixture
def run_here(here: Run) -> TextRun:
    """Run in this process."""

    def invoke(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        done = here("run", *arguments, environment={"CI": "1"})
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    return invoke


def start(*arguments: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    # A test run in the background ignores SIGINT, and would hand that down.
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


MIXED = [
    {"custom_id": "chat", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "Hello"}]}},
    "{broken",
    {"id": "ids", "prompt_token_ids": [5, 6, 7], "max_tokens": 5, "ignore_eos": True, "return_token_ids": True},
    {"id": "ids", "prompt": "again"},
    {"id": "typo", "prompt": "Hello", "max_tokens": "64"},
    {"id": "huge", "prompt_token_ids": [5], "max_tokens": 10**9},
    {"id": "vocabulary", "prompt_token_ids": [10**9]},
    {"id": "warned", "prompt": "Hello", "max_tokens": 1, "colour": "red"},
]


def test_good_lines_are_answered_and_bad_ones_named_whatever_stands_beside_them(
    run_here: TextRun, tmp_path: Path
) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", *MIXED), tmp_path / "out.jsonl"
    done = run_here(source, "-o", output, "--order", "input", "-n", "4", *SMALL)
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
    assert "3 answered, 5 bad" in done.stderr
    assert "warning  unknown key 'colour' ignored (1 line)" in done.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    statuses = [(r["custom_id"], r["response"] and r["response"]["status_code"]) for r in records]
    assert statuses == [
        ("chat", 200),
        (None, None),
        ("ids", 200),
        ("ids", 400),
        ("typo", 400),
        ("huge", 400),
        ("vocabulary", 400),
        ("warned", 200),
    ]
    body = records[2]["response"]["body"]
    assert len(body["choices"][0]["token_ids"]) == body["usage"]["completion_tokens"] == 5
    assert body["trimkv"]["cache"]["seen_tokens"] == 7
    assert body["trimkv"]["kv_budget"] == 16
    error = records[5]["response"]["body"]["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")


@pytest.mark.slow
def test_results_stream_while_the_input_is_still_open() -> None:
    process = start("-", "-n", "2", *SMALL)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for name in ("first", "second"):
            process.stdin.write(json.dumps({"id": name, "prompt": "Hello"}).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["custom_id"] == name
        process.stdin.close()
        assert process.wait(120) == 0
    finally:
        finish(process)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_signal_lets_rows_in_flight_end_within_the_grace_and_the_same_command_resumes(tmp_path: Path) -> None:
    """Catches torn or lost lines, an exit code that hides what happened, and a second signal that is not obeyed."""
    lines = [{"id": "short", "prompt": "a", "max_tokens": 2}, {"id": "long", "prompt": "b", "max_tokens": 60_000}]
    source, output = write_lines(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    arguments = [str(source), "-o", str(output), "--ignore-eos", *SMALL]
    for signals, code in (([signal.SIGINT], 75), ([signal.SIGTERM] * 2, 143)):
        began = time.time()
        process = start(*arguments, "--grace", "0.3s" if code == 75 else "600s")
        try:
            sidecar = output.with_name("out.jsonl.trimkv.json")
            while process.poll() is None and not (
                sidecar.exists() and sidecar.stat().st_mtime > began and _size(output)
            ):
                time.sleep(0.05)
            time.sleep(0.2)
            for number in signals:
                process.send_signal(number)
                time.sleep(0.2)
            assert process.wait(120) == code
            assert process.stderr is not None
            said = process.stderr.read()
            assert b"Traceback" not in said
            assert code != 75 or b"hint: the same command resumes" in said
        finally:
            finish(process)
        assert [json.loads(line)["custom_id"] for line in output.read_text().splitlines()] == ["short"]
    done = trimkv_run(source, "-o", output, "--ignore-eos", "--timeout", "0.2s", *SMALL)
    assert done.returncode == 3
    assert [json.loads(line)["error"] is None for line in output.read_text().splitlines()] == [True, False]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_reader_that_goes_away_ends_the_run() -> None:
    process = start("-", "-n", "1", "--ignore-eos", *SMALL)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        process.stdin.write(b'{"prompt":"a"}\n')
        process.stdin.flush()
        process.stdout.readline()
        process.stdout.close()
        process.stdin.write(b'{"prompt":"a"}\n')
        process.stdin.flush()
        assert process.wait(120) == 141
        assert b"Traceback" not in process.stderr.read()
    finally:
        finish(process)


def finish(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def test_deterministic_lines_are_the_same_bytes_in_any_company(run_here: TextRun, tmp_path: Path) -> None:
    """Only the line number may tell of the neighbours, so the line that is compared comes first."""
    mine = {"id": "me", "prompt": "Once upon a time", "temperature": 1.0, "max_tokens": 24, "ignore_eos": True}
    others = [{"id": str(n), "prompt": "x" * (n + 1), "max_tokens": 3 * n + 1} for n in range(6)]
    alone = run_here(write_lines(tmp_path / "a.jsonl", mine), "--deterministic", "--order", "input", *SMALL)
    company = run_here(write_lines(tmp_path / "b.jsonl", mine, *others), "--deterministic", "--order", "input", *SMALL)
    assert alone.returncode == company.returncode == 0, company.stderr
    assert alone.stdout.splitlines()[0] == company.stdout.splitlines()[0]


def test_validate_lists_each_problem_with_its_line_and_loads_no_model(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", *MIXED)
    started = time.perf_counter()
    done = trimkv_run(source, "--validate")
    assert time.perf_counter() - started < 10
    assert done.returncode == 3
    lines = [line.removeprefix(f"{source}:") for line in done.stdout.splitlines()]
    assert lines[0].startswith("2: invalid JSON at column 2")
    assert lines[1:] == [
        "4: custom_id 'ids' was used by an earlier line",
        "5: max_tokens: input should be a valid integer",
        "6: 1000000000 positions or more are needed, and the model has 65536",
        "7: token id 1000000000 is outside the vocabulary of 1536",
    ]
    assert "not checked without the model: how long prompts are" in done.stderr


BODIES: list[dict[str, Any]] = [
    {"model": "mini"},
    {"model": "gpt-4"},
    {"colour": "red"},
    {"temperature": 3},
    {"temperature": -1},
    {"top_p": 0},
    {"logit_bias": {"5": 1}},
    {"logit_bias": {"5": 200}},
    {"logit_bias": {"999999": 1}},
    {"max_tokens": 0},
    {"max_tokens": 10**6},
    {"max_completion_tokens": 10**6},
    {"n": 2.0},
    {"n": 129},
    {"stop": ["a", ""]},
    {"stop": ["x"]},
    {"seed": 2**64},
    {"top_logprobs": 2},
    {"stream": True},
    {"tools": [{"type": "function"}]},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_object"}, "ignore_eos": True},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"messages": []},
    {"messages": None, "prompt_token_ids": [5, 6]},
    {"messages": None, "prompt_token_ids": [5, 10**6]},
]


def test_validate_refuses_what_the_run_refuses_and_nothing_else(run_here: TextRun, tmp_path: Path) -> None:
    """Catches a check that passes lines which the run refuses, or refuses lines that it would answer."""
    hello = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    source = write_lines(tmp_path / "in.jsonl", *({**hello, **body} for body in BODIES))
    checked = run_here(source, "--validate", "-m", "mini", "--strict")
    ran = run_here(source, "--order", "input", *SMALL, "--strict")
    records = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(records) == len(BODIES)
    refused = [n for n, record in enumerate(records, 1) if record["response"]["status_code"] != 200]
    assert [int(line.removeprefix(f"{source}:").partition(":")[0]) for line in checked.stdout.splitlines()] == refused
    assert {1, 2, 3} & {*refused} == {2, 3}


COLOUR = {"type": "object", "properties": {"p": {"enum": ["red", "green"]}}, "required": ["p"]}


def test_a_small_model_spends_few_tokens_on_a_schema(run_here: TextRun, tmp_path: Path) -> None:
    """Catches newlines between the braces until max_tokens, and an empty answer where nothing satisfies a schema."""
    schemas = [{**COLOUR, "additionalProperties": False}, {"$ref": "#"}]
    lines = [
        {
            "messages": [{"role": "user", "content": "Give an example."}],
            "max_tokens": 80,
            "temperature": 0,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        }
        for schema in schemas
    ]
    done = run_here(write_lines(tmp_path / "in.jsonl", *lines), "--order", "input", *SMALL)
    answered, refused = [json.loads(line)["response"] for line in done.stdout.splitlines()]
    [choice] = answered["body"]["choices"]
    assert json.loads(choice["message"]["content"])["p"] in ("red", "green")
    assert choice["finish_reason"] == "stop"
    assert answered["body"]["usage"]["completion_tokens"] < 25
    assert (refused["status_code"], refused["body"]["error"]["code"]) == (400, "invalid_schema")


def test_a_text_file_is_one_prompt_per_line(run_here: TextRun, tmp_path: Path) -> None:
    source = tmp_path / "prompts.txt"
    source.write_text("Hello\n\n{not json\n")
    done = run_here(source, "-n", "2", "--limit", "2", "-q", *SMALL)
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads(line)["custom_id"] for line in done.stdout.splitlines()) == ["line-1", "line-3"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jsonl"], "error: cannot read absent.jsonl: No such file or directory"),
        (["."], "error: cannot read .: Is a directory"),
        (
            ["in.jsonl", "-o", "in.jsonl", "--overwrite"],
            "error: -o in.jsonl would overwrite what is read: INPUT in.jsonl is the same file",
        ),
        (["in.jsonl", "-o", "old.jsonl"], "error: old.jsonl exists, and no old.jsonl.trimkv.json beside it"),
        (["in.jsonl", "--shard", "5/4"], "error: --shard 5/4 is no part of a whole"),
        (["in.jsonl", "--max-errors", "lots"], "error: --max-errors lots is no count and no share"),
        (["in.csv"], "error: in.csv is a table: which column holds the prompts?"),
        (["in.jsonl", "-o", "nowhere/out.jsonl"], "error: no folder nowhere to write out.jsonl into"),
        (["in.jsonl", "--temperature", "-1"], "error: temperature = -1.0 is out of range"),
        (["in.jsonl", "--max-line", "5 apples"], "error: --max-line 5 apples: '5 apples' is not a size"),
        (["in.jsonl", "--order", "random"], "error: "),
    ],
)
def test_a_command_that_cannot_work_is_exit_2_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.jsonl", {"prompt": "a"})
    (tmp_path / "old.jsonl").write_text("{}\n")
    (tmp_path / "in.csv").touch()
    done = trimkv_run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(message)
    assert "hint: " in done.stderr
