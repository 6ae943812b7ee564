"""Mistakes of `trimkv eval` as a user would meet them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from bench.kvpress_answers import by_document, read_questions
from helpers.programs import Run
from trimkv_cli.mini import MODEL_FOLDER

SMALL = ("mini", "--samples", "2", "--context", "60", "--tasks", "recall", "--seed", "7", "--threads", "1")


def test_json_is_rows_and_nothing_else(here: Run) -> None:
    """Catches talk on stdout, and a row without what the table is made of."""
    done = here("eval", *SMALL, "--budgets", "8,16", "--policies", "full,streaming", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["policy"], row["kv_budget"]) for row in rows] == [
        ("full", None), ("streaming", 8), ("streaming", 16)
    ]  # fmt: skip
    for row in rows:
        assert (row["task"], row["n"], row["seed"], row["prefill_chunk"], row["context"]) == ("recall", 2, 7, 32, 60)
        low, high = row["ci95"]
        assert 0 <= low <= row["accuracy"] <= high <= 1
        assert row["decode_tps"] > 0
        assert row["peak_bytes"] > row["kv_bytes"]
    assert b"recall streaming M=16: " in done.stderr
    assert b"\x1b" not in done.stderr


def test_table_and_plot_go_into_a_pipe(here: Run) -> None:
    """Catches colours in a pipe, a table that is cut, and a plot that only matplotlib can draw."""
    done = here("eval", *SMALL, "--kv-budget", "8", "-q", environment={"FORCE_COLOR": "1", "COLUMNS": "40"})
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert "\x1b" not in text
    assert "…" not in text
    assert "recall: accuracy against M   F full  G gates  K keydiff  S streaming  P protected  R random" in text
    assert "100% |" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tasks", "memory"), b"there is no task 'memory'"),
        (("--policies", "lru"), b"there is no policy 'lru'"),
        (("--budgets", "8", "--kv-budget", "8"), b"both given"),
        (("--budgets", "8,x"), b"x"),
        (("--samples", "0"), b"need 1 or more"),
        (("--plot", "accuracy.gif"), b"neither PNG nor SVG"),
        (("--data", "nowhere.jsonl"), b"cannot read nowhere.jsonl"),
    ],
)
def test_what_cannot_be_asked_is_said(here: Run, arguments: tuple[str, ...], said: bytes) -> None:
    """Catches a typing error that costs a run, or a traceback."""
    done = here("eval", *SMALL, *arguments)
    assert done.returncode == 2
    assert done.stdout == b""
    assert said in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_bad_line_is_named_by_file_and_number(here: Run, tmp_path: Path) -> None:
    """Catches a bad line that nobody can find."""
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    done = here("eval", "mini", "--data", path, "--threads", "1")
    assert done.returncode == 2
    assert f"{path}:2: answer".encode() in done.stderr


def test_questions_go_out_and_answers_come_back(here: Run, tmp_path: Path) -> None:
    """Catches questions that need weights to be written, and a table that needs a model to be made."""
    questions, answers = tmp_path / "q.jsonl", tmp_path / "snapkv.jsonl"
    done = here("eval", "mini", "--tasks", "needle", "--samples", "8", "--context", "200", "--export", questions)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    (group,) = by_document(read_questions(lines))
    assert len(group) == 8
    assert [q.id for q in group] == [line["id"] for line in lines]
    assert len({q.asked for q in group}) == 8
    answers.write_text("".join(json.dumps({"id": line["id"], "output": line["answer"]}) + "\n" for line in lines))
    done = here("eval", "--data", questions, "--answers", answers, "--json")
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["policy"], row["accuracy"], row["n"]) == ("snapkv", 1.0, 8)
    assert here("eval", "--answers", answers).returncode == 2


def test_plot_files(here: Run, tmp_path: Path) -> None:
    """Catches a plot that is not drawn, and a missing matplotlib that is found out at the end."""
    path = tmp_path / "accuracy.svg"
    done = here("eval", *SMALL, "--budgets", "8,16", "--plot", path, "--json")
    if importlib.util.find_spec("matplotlib") is None:
        assert done.returncode == 2
        assert b"pip install 'trimkv-cli[plot]'" in done.stderr
        assert done.stdout == b""
    else:
        assert done.returncode == 0, done.stderr
        assert path.read_text().startswith("<?xml")


def test_a_model_without_gates_is_compared_without_them(here: Run, tmp_path: Path) -> None:
    """Catches default policies that fail because of one that nobody asked for."""
    for path in MODEL_FOLDER.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    done = here("eval", tmp_path, *SMALL[1:], "--budgets", "8", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["policy"] for row in json.loads(done.stdout)["rows"]] == [
        "full",
        "keydiff",
        "streaming",
        "protected",
        "random",
    ]
    asked = here("eval", tmp_path, *SMALL[1:], "--budgets", "8", "--policies", "full,gates")
    assert (asked.returncode, b"is no trained gate" in asked.stderr) == (2, True)
