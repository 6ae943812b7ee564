"""Mistakes in taking an output up again: lost or doubled lines, another input, another model, a second writer."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.jobs.lines import BadLine, Rules
from trimkv_cli.jobs.progress import Summary
from trimkv_cli.jobs.reading import LineReader, open_input
from trimkv_cli.jobs.resuming import (
    Sidecar,
    check_beginning,
    check_fingerprint,
    drop_failures,
    locked,
    path_beside,
    read_earlier,
    read_sidecar,
    remembering,
    write_sidecar,
)
from trimkv_cli.jobs.selection import Bitmap, IdIndex, Selection, Shard, is_success, line_of, parse_lines, scan
from trimkv_cli.jobs.writing import open_output


def answer(line: int, **body: Any) -> dict[str, Any]:
    body = {"choices": [], "trimkv": {"line": line}, **body}
    return {"custom_id": f"r{line}", "response": {"status_code": 200, "body": body}, "error": None}


@pytest.mark.parametrize(
    "record",
    [
        {"response": None, "error": {"code": "batch_expired", "message": "…"}},  # OpenAI, documented
        {"response": {"status_code": 400, "body": {"error": {"message": "…", "code": None}}}, "error": None},  # actual
        {"response": {"status_code": 429, "body": {"error": {"message": "…"}}}, "error": None},
        {
            "response": {"status_code": 400, "request_id": "v"},
            "error": {"error": {"message": "…", "code": 400}},
        },  # vLLM
        {"response": {"status_code": 400, "body": None}, "error": "Only /v1/… are supported"},
        {"response": {"status_code": 200, "body": {"object": "error", "message": "…", "code": 400}}, "error": None},
        {"response": {"status_code": 200, "body": None}, "error": None},
        {"response": "lost", "error": None},
        {},
    ],
)
def test_every_shape_of_a_failure_is_one(record: dict[str, Any]) -> None:
    assert not is_success(record)


def test_answers_of_others_are_answers_and_are_known_by_their_ids() -> None:
    theirs = {"custom_id": "a", "response": {"status_code": 200, "body": {"choices": [{}]}}, "error": None}
    failed = {"custom_id": "b", "response": None, "error": {"code": "x"}}
    earlier = scan([json.dumps(r).encode() for r in (theirs, failed, answer(7))], "out.jsonl")
    assert (line_of(theirs), line_of(answer(7)), line_of({"trimkv": {"line": 3}})) == (None, 7, 3)
    assert earlier.answered(7, retry_errors=True)
    assert earlier.answered_id("a", retry_errors=True)
    assert earlier.answered_id("b", retry_errors=False)
    assert not earlier.answered_id("b", retry_errors=True)


@pytest.mark.parametrize("line", [b"{broken\n", b"[1]\n", b"{}\n", b'{"trimkv":{"line":-5}}\n'])
def test_what_is_no_record_is_named_by_its_line(line: bytes) -> None:
    with pytest.raises(InputError, match=r"line 2 of out\.jsonl is no result"):
        scan([json.dumps(answer(1)).encode(), line], "out.jsonl")


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst"])
def test_a_kill_at_any_byte_loses_no_record_that_was_written_before(tmp_path: Path, name: str) -> None:
    """Catches torn lines taken for whole ones, and packed records that are flushed but cannot be read again."""
    output, sizes = tmp_path / name, [0]
    with open_output(str(output)) as out:
        for line in range(1, 7):
            out.write(json.dumps(answer(line, text="é" * line)).encode() + b"\n")
            sizes.append(output.stat().st_size)
    whole = output.read_bytes()
    for cut in range(len(whole) + 1):
        output.write_bytes(whole[:cut])
        earlier = read_earlier(output)
        written = max(count for count, size in enumerate(sizes) if size <= cut)
        assert written <= earlier.records <= written + 1
        with open_output(str(output)) as out:
            for line in range(earlier.records + 1, 7):
                out.write(json.dumps(answer(line)).encode() + b"\n")
        with open_input(str(output)) as stream:
            assert [json.loads(line)["custom_id"] for line in stream] == [f"r{n}" for n in range(1, 7)]


def test_a_torn_end_is_set_aside(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(json.dumps(answer(1)).encode() + b'\n{"custom_id": "to')
    assert read_earlier(output).records == 1
    assert output.with_name("out.jsonl.trimkv.torn").read_bytes() == b'{"custom_id": "to\n'
    assert output.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.jsonl.zst"])
def test_failures_are_dropped_and_answers_stay(tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    failed = {"custom_id": None, "response": None, "error": {"code": "x"}, "trimkv": {"line": 2}}
    with open_output(str(output)) as out:
        for record in (answer(1), failed, answer(3)):
            out.write(json.dumps(record).encode() + b"\n")
    drop_failures(output)
    earlier = read_earlier(output)
    assert (earlier.records, earlier.failures, 1 in earlier.done, 3 in earlier.done) == (2, 0, True, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_a_packed_input_that_is_damaged_or_cut_off_says_so(tmp_path: Path) -> None:
    for suffix in ("gz", "zst"):
        path = tmp_path / f"in.jsonl.{suffix}"
        for _ in range(2):  # two frames
            with open_output(str(path)) as out:
                out.write(b'{"prompt": "a"}\n')
        assert len(list(LineReader(open_input(str(path))))) == 2
        whole = path.read_bytes()
        for broken, said in ((whole[:-3], "cut off"), (whole + b"garbage that is no frame", "damaged")):
            path.write_bytes(broken)
            with pytest.raises(InputError, match=said):
                list(LineReader(open_input(str(path))))


def remember(data: bytes) -> tuple[int, str]:
    """Read all of `data`; return what the sidecar would hold, which never lags behind what was handed on."""
    told: list[tuple[int, str]] = []
    stream = remembering(cast(BinaryIO, io.BytesIO(data)), lambda count, sha256: told.append((count, sha256)))
    read = 0
    while chunk := stream.read1(3):
        read += len(chunk)
        assert told[-1][0] >= read
    return told[-1] if told else (0, "")


BEGINNINGS = [
    (b"a\nb\n", b"a\nb\n", True),
    (b"a\nb\n", b"a\nb\nc\n", True),
    (b"a\nb", b"a\nb\nc\n", True),
    (b"a\nb", b"a\nb", True),
    (b"", b"anything", True),
    (b"a\nb", b"a\nbc\n", False),
    (b"a\nb\n", b"a\nB\n", False),
    (b"a\nb\n", b"a\n", False),
    (b"a\nb\n", b"", False),
]


@pytest.mark.parametrize("is_pipe", [False, True])
@pytest.mark.parametrize(("before", "now", "same"), BEGINNINGS)
def test_an_input_may_grow_by_lines_and_change_in_no_other_way(
    tmp_path: Path, before: bytes, now: bytes, same: bool, is_pipe: bool
) -> None:
    if is_pipe:
        read_end, write_end = os.pipe()
        os.write(write_end, now)
        os.close(write_end)
        stream: BinaryIO = os.fdopen(read_end, "rb")
    else:
        (tmp_path / "in").write_bytes(now)
        stream = (tmp_path / "in").open("rb")
    count, sha256 = remember(before)
    try:
        if same:
            stream = check_beginning(stream, count, sha256)
            assert stream.read() == now
        else:
            with pytest.raises(UsageError, match="does not begin as"):
                check_beginning(stream, count, sha256)
    finally:
        stream.close()


def test_other_settings_are_named() -> None:
    with pytest.raises(UsageError, match=r"kv_budget \(32 before, 64 now\), quantize \(None before, int8 now\)"):
        check_fingerprint(Path("o"), {"a": "1", "kv_budget": "32"}, {"a": "1", "kv_budget": "64", "quantize": "int8"})
    check_fingerprint(Path("o"), {"a": "1"}, {"a": "1"})


def test_a_sidecar_is_read_as_written_and_refused_when_damaged(tmp_path: Path) -> None:
    path = path_beside(tmp_path / "out.jsonl")
    assert read_sidecar(path) is None
    sidecar = Sidecar(fingerprint={"a": "1"}, input_bytes=3, input_sha256="x")
    write_sidecar(path, sidecar)
    assert read_sidecar(path) == sidecar
    for damaged in ("", "[]", '{"format": 99}', '{"format": 1, "fingerprint"'):
        path.write_text(damaged)
        with pytest.raises(InputError):
            read_sidecar(path)


def test_two_writers_are_forbidden(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with locked(output), pytest.raises(UsageError, match="another trimkv run writes"), locked(output):
        pass
    with locked(output):
        pass
    assert list(tmp_path.iterdir()) == []


LINES = b"".join(b'{"id": "r%d", "prompt": "a"}\n' % (n % 17) for n in range(1, 21))  # 18 to 20 repeat ids


def select(**choices: Any) -> list[tuple[int, str | None]]:
    """Return line numbers and what is wrong with them."""
    parsed = parse_lines(LineReader(io.BytesIO(LINES)), Rules(), Selection(**choices))
    return [(line.line, line.code if isinstance(line, BadLine) else None) for line in parsed]


def test_shards_are_the_whole_and_judge_ids_as_the_whole_does() -> None:
    whole = select()
    shards = [select(shard=Shard(index=index, of=3)) for index in (1, 2, 3)]
    assert sorted(line for shard in shards for line in shard) == whole
    assert [line for line, code in whole if code == "duplicate_custom_id"] == [18, 19, 20]


@given(st.sets(st.integers(1, 20)), st.sets(st.integers(1, 20)), st.booleans())
def test_a_resumed_run_takes_what_has_no_answer(done: set[int], failed: set[int], retry: bool) -> None:
    records = [answer(n) for n in done] + [{"error": {"code": "x"}, "trimkv": {"line": n}} for n in failed]
    earlier = scan([json.dumps(record).encode() for record in records], "out")
    left = [line for line, _ in select(earlier=earlier, retry_errors=retry)]
    assert left == [n for n in range(1, 21) if n not in done and (retry or n not in failed)]


def test_an_output_in_order_is_not_resumed_out_of_order() -> None:
    gap = scan([json.dumps(answer(n)).encode() for n in (1, 3)], "out")
    with pytest.raises(UsageError, match="line 2 is missing"):
        select(earlier=gap, in_order=True)
    begun = scan([json.dumps(answer(n)).encode() for n in (1, 2)], "out")
    assert select(earlier=begun, in_order=True)[0] == (3, None)


def test_what_is_skipped_is_counted() -> None:
    earlier = scan([json.dumps(r).encode() for r in (answer(1), {"error": "x", "trimkv": {"line": 2}})], "out")
    summary = Summary()
    list(parse_lines(LineReader(io.BytesIO(LINES)), Rules(), Selection(earlier=earlier, limit=5), summary))
    assert (summary.skipped, summary.failed_before) == (1, 1)


@given(st.sets(st.integers(0, 5000)))
def test_a_bitmap_is_a_set(numbers: set[int]) -> None:
    bitmap = Bitmap()
    for number in [*numbers, *numbers]:
        bitmap.add(number)
    assert bitmap.count == len(numbers)
    assert {n for n in range(5100) if n in bitmap} == numbers


@given(st.lists(st.tuples(st.text(max_size=3), st.booleans())))
def test_an_index_is_a_set_of_ids(ids: list[tuple[str, bool]]) -> None:
    index, seen = IdIndex(), set[str]()
    for custom_id, only_noted in ids:
        if only_noted:
            index.note(custom_id)
        else:
            assert index.add(custom_id) == (custom_id not in seen)
        seen.add(custom_id)
    assert all(custom_id in index for custom_id in seen)
    assert "never used" not in index
