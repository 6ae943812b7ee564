"""Mistakes of `summarize`, `inspect` and `chat` as a user would meet them."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.programs import Run

SHORT = ("-n", "6", "--greedy", "--ignore-eos", "--threads", "1")


def test_a_broken_file_does_not_stop_the_others(here: Run, tmp_path: Path) -> None:
    """Catches a run that ends at the first bad file, hides it, or calls itself a success."""
    good, other, binary = tmp_path / "good.txt", tmp_path / "other.txt", tmp_path / "binary.txt"
    good.write_text("The meeting is on Friday. " * 5)
    other.write_text("The train leaves at noon. " * 5)
    binary.write_bytes(b"\x00\x01\x02")
    done = here("summarize", good, binary, other, *SHORT)
    assert done.returncode == 3
    assert [line for line in done.stdout.decode().splitlines() if line.startswith("## ")] == [
        f"## {good}",
        f"## {other}",
    ]
    assert b"binary.txt is binary" in done.stderr
    records = [json.loads(line) for line in here("summarize", good, other, *SHORT, "--json").stdout.splitlines()]
    assert [record["trimkv"]["input"] for record in records] == [str(good), str(other)]


def test_forty_files_of_which_three_are_broken(here: Run, tmp_path: Path) -> None:
    """Catches summaries out of order or lost, a broken file that is not named, and a wrong exit code."""
    names = [tmp_path / f"{index:02}.txt" for index in range(40)]
    for index, name in enumerate(names):
        name.write_bytes(b"\x89PNG\0\0" if index in (3, 17, 39) else f"Note 1: the box is in room {index}.".encode())
    done = here("summarize", f"{tmp_path}/*.txt", "-n", "3", "--greedy", "-q", "--threads", "1")
    titles = [line for line in done.stdout.decode().splitlines() if line.startswith("## ")]
    assert titles == [f"## {name}" for index, name in enumerate(names) if index not in (3, 17, 39)]
    assert done.returncode == 3
    errors = [line for line in done.stderr.decode().splitlines() if line.startswith("error: ")]
    assert [line.split(" is ")[0] for line in errors[:-1]] == [f"error: {names[index]}" for index in (3, 17, 39)]
    assert errors[-1] == "error: 3 of 40 files failed"


def test_a_file_past_the_positions_is_refused_not_cut(here: Run, tmp_path: Path) -> None:
    """Catches silent truncation."""
    long = tmp_path / "long.txt"
    long.write_text("word after word " * 30000)
    done = here("summarize", long, *SHORT)
    assert done.returncode == 4
    assert done.stdout == b""
    assert b"65536" in done.stderr


def test_inspect_counts_what_was_fed(here: Run, tmp_path: Path) -> None:
    """Catches a last token that is counted although it is never fed, and more kept than the budget."""
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(list(range(5, 45))))
    done = here("inspect", "--prompt-token-ids", ids, "--json", "--kv-budget", "12", "-q", *SHORT)
    record = json.loads(done.stdout)
    assert record["seen"] == 40 + 6 - 1
    assert len(record["output_token_ids"]) == 6
    assert len(record["kept"]) == 4
    for heads, log_betas in zip(record["kept"], record["log_beta"], strict=True):
        assert [len(kept) for kept in heads] == [12] * 4
        assert all(kept == sorted(set(kept)) and kept[-1] < record["seen"] for kept in heads)
        assert [len(values) for values in log_betas] == [record["seen"]] * 4
        assert all(value <= 0 for values in log_betas for value in values)


def test_an_empty_file_is_refused(here: Run, tmp_path: Path) -> None:
    """Catches a summary that is made up of nothing."""
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    done = here("summarize", empty, *SHORT)
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.count(b"error: ") == 1
