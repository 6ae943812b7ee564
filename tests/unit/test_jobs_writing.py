"""Mistakes that would destroy a file or tear a record."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trimkv_cli.errors import TrimkvError, UsageError
from trimkv_cli.jobs.reading import open_input
from trimkv_cli.jobs.writing import Writer, check_output, open_output


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("{}\n")
    return path


def refuse(source: Path, output: Path) -> str:
    with open_input(str(source)) as stream, pytest.raises(UsageError) as caught:
        check_output(str(output), stream)
    assert caught.value.hint
    return caught.value.message


def test_the_input_is_never_the_output_under_any_name(source: Path, tmp_path: Path) -> None:
    for name, link in (("hard", os.link), ("soft", os.symlink)):
        link(source, tmp_path / name)
        assert "is the input" in refuse(source, tmp_path / name)
    assert "is the input" in refuse(source, source)


@pytest.mark.parametrize("name", ["absent/out.jsonl", "."])
def test_an_output_that_cannot_be_made_is_refused_at_once(source: Path, tmp_path: Path, name: str) -> None:
    refuse(source, tmp_path / name)


def test_a_device_may_be_written_to(source: Path) -> None:
    with open_input(str(source)) as stream:
        check_output(os.devnull, stream)
    with open_output(os.devnull) as out:
        out.write(b"x")


def test_a_record_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with open_output(str(output)) as out:
        Writer(out).write(5, b"a\n")
        assert output.read_bytes() == b"a\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("name", ["full", "full.gz", "full.zst"])
def test_a_full_disk_is_one_line_with_its_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(TrimkvError, match="No space left") as caught, open_output(str(tmp_path / name)) as out:
        Writer(out).write(0, b"a\n")
    assert caught.value.exit_code == 1


def test_records_in_order_wait_for_those_before_them(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with open_output(str(output)) as out:
        writer = Writer(out, order="input")
        writer.write(2, b"2\n")
        writer.write(1, b"1\n")
        assert (writer.held, output.read_bytes()) == (2, b"")
        writer.write(0, b"0\n")
        assert (writer.held, output.read_bytes()) == (0, b"0\n1\n2\n")
