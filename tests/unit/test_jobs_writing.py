"""Mistakes that would destroy a file or tear a record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, cast

import pytest

from trimkv_cli.errors import TrimkvError, UsageError
from trimkv_cli.jobs.reading import open_input
from trimkv_cli.jobs.writing import Writer, check_output, open_output


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("{}\n")
    return path


def refuse(source: Path, output: Path, *, overwrite: bool = False) -> str:
    with open_input(str(source)) as stream, pytest.raises(UsageError) as caught:
        check_output(str(output), stream, overwrite=overwrite)
    assert caught.value.hint
    return caught.value.message


def test_the_input_is_never_the_output_under_any_name(source: Path, tmp_path: Path) -> None:
    for name, link in (("hard", os.link), ("soft", os.symlink)):
        link(source, tmp_path / name)
        assert "is the input" in refuse(source, tmp_path / name, overwrite=True)
    assert "is the input" in refuse(source, source, overwrite=True)


def test_an_output_that_exists_is_replaced_only_when_told(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("results")
    assert "exists" in refuse(source, output)
    with open_input(str(source)) as stream:
        check_output(str(output), stream, overwrite=True)
    with open_output(str(output), overwrite=True) as out:
        out.write(b"new")
    assert output.read_text() == "new"


def test_an_output_that_appears_while_the_model_loads_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("someone else's")
    with pytest.raises(UsageError, match="File exists"), open_output(str(tmp_path / "out.jsonl"), overwrite=False):
        pass
    assert (tmp_path / "out.jsonl").read_text() == "someone else's"


@pytest.mark.parametrize("name", ["absent/out.jsonl", "."])
def test_an_output_that_cannot_be_made_is_refused_at_once(source: Path, tmp_path: Path, name: str) -> None:
    refuse(source, tmp_path / name)


def test_a_device_may_be_written_to(source: Path) -> None:
    with open_input(str(source)) as stream:
        check_output(os.devnull, stream, overwrite=False)
    with open_output(os.devnull, overwrite=False) as out:
        out.write(b"x")


def test_a_record_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with open_output(str(output), overwrite=False) as out:
        Writer(out).write(5, b"a\n")
        assert output.read_bytes() == b"a\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_one_line_with_its_reason() -> None:
    with Path("/dev/full").open("wb", buffering=0) as out, pytest.raises(TrimkvError, match="No space left") as caught:
        Writer(cast(BinaryIO, out)).write(0, b"a\n")
    assert caught.value.exit_code == 1


def test_records_in_order_wait_for_those_before_them(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with open_output(str(output), overwrite=False) as out:
        writer = Writer(out, order="input")
        writer.write(2, b"2\n")
        writer.write(1, b"1\n")
        assert (writer.held, output.read_bytes()) == (2, b"")
        writer.write(0, b"0\n")
        assert (writer.held, output.read_bytes()) == (0, b"0\n1\n2\n")
