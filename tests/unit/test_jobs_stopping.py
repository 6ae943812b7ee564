"""Mistakes in ending a job early: lines lost, written twice, or run past their limit."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.fake_engine import RECORDER, FakeEngine, FakeText
from trimkv_cli.errors import UsageError
from trimkv_cli.jobs.job import Job, run_job
from trimkv_cli.jobs.lines import Rules
from trimkv_cli.jobs.progress import ErrorLimit, Limits, Stop, Summary, parse_error_limit, stopped_by_signals
from trimkv_cli.jobs.reading import LineReader
from trimkv_cli.jobs.selection import parse_lines
from trimkv_cli.jobs.writing import Writer


def run(*lines: Any, limits: Limits, stop: Stop | None = None, rows: int = 2) -> tuple[list[dict[str, Any]], Summary]:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    out, engine = io.BytesIO(), FakeEngine(max_rows=rows, text=FakeText())
    items = parse_lines(LineReader(io.BytesIO("\n".join(texts).encode())), Rules())
    summary = run_job(
        engine, Job(lines=items, sink=Writer(out), recorder=RECORDER, limits=limits or Limits(), stop=stop or Stop())
    )
    assert engine.queue == [] or summary.stopped is None
    return [json.loads(line) for line in out.getvalue().splitlines()], summary


def prompts(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": "ab", "max_tokens": 3, **more} for _ in range(count)]


def test_an_item_that_takes_too_long_is_a_failure_and_makes_room() -> None:
    """The fake engine says that one step takes a second."""
    lines = [{"prompt": "ab", "max_tokens": 50}, *prompts(3)]
    records, summary = run(*lines, limits=Limits(timeout_s=5))
    late = next(record for record in records if record["custom_id"] == "line-1")
    assert (late["response"], late["error"]["code"]) == (None, "timeout")
    assert (summary.done, summary.failed, summary.stopped) == (3, 1, None)


def test_one_choice_that_fails_takes_the_others_with_it() -> None:
    records, summary = run({"prompt": "!x", "n": 3, "max_tokens": 9}, *prompts(2), limits=Limits(), rows=4)
    assert [record["error"] is None for record in records].count(False) == 1
    assert (summary.done, summary.failed) == (2, 1)


def test_several_choices_stand_in_one_record() -> None:
    [record], summary = run({"prompt": "ab", "n": 3, "max_tokens": 2, "logprobs": False}, limits=Limits())
    body = record["response"]["body"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (2, 6)
    assert (summary.prompt_tokens, summary.completion_tokens) == (2, 6)


@pytest.mark.parametrize(("limits", "errors"), [(Limits(fail_fast=True), 1), (Limits(errors=ErrorLimit(count=2)), 3)])
def test_too_many_failures_end_the_job(limits: Limits, errors: int) -> None:
    lines = [line for _ in range(200) for line in ("{", *prompts(1))]
    records, summary = run(*lines, limits=limits)
    assert summary.stopped == "errors"
    assert summary.errors == errors
    assert len(records) == summary.lines < 400


def test_a_share_of_failures_is_judged_from_a_hundred_lines_on() -> None:
    limit = ErrorLimit(percent=5.0)
    assert not limit.exceeded(Summary(done=10, bad=10))
    assert not limit.exceeded(Summary(done=95, bad=5))
    assert limit.exceeded(Summary(done=94, bad=6))


@pytest.mark.parametrize("text", ["", "-1", "x", "101%", "1.5", "nan", "5%%"])
def test_a_limit_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_error_limit(text)


def test_limits_are_read_as_written() -> None:
    assert parse_error_limit("0") == ErrorLimit(count=0)
    assert parse_error_limit(" 2.5 %") == ErrorLimit(percent=2.5)


def test_a_stopped_job_lets_rows_end_and_takes_no_more() -> None:
    stop = Stop()
    stop.ask("signal")
    records, summary = run(*prompts(5), limits=Limits(), stop=stop)
    assert (records, summary.stopped) == ([], "signal")


def test_only_rows_in_flight_get_the_grace() -> None:
    """Catches requests that wait in the engine and are begun after the signal."""
    stop, out = Stop(), io.BytesIO()
    engine = FakeEngine(max_rows=2, text=FakeText(), starts_at=6)
    items = parse_lines(LineReader(io.BytesIO("\n".join(map(json.dumps, prompts(6))).encode())), Rules())
    job = Job(lines=items, sink=Writer(out), recorder=RECORDER, progress=lambda _: stop.ask("signal"), stop=stop)
    run_job(engine, job)
    assert [json.loads(line)["custom_id"] for line in out.getvalue().splitlines()] == ["line-1", "line-2"]


def test_time_is_up_for_rows_in_flight_after_the_grace() -> None:
    records, summary = run(*prompts(500), limits=Limits(max_time_s=1e-9, grace_s=0.0))
    assert summary.stopped == "time"
    assert len(records) == summary.done < 500


def test_a_job_that_was_done_when_it_was_stopped_is_done() -> None:

    stop = Stop()
    engine, out = FakeEngine(text=FakeText()), io.BytesIO()
    items = parse_lines(LineReader(io.BytesIO(b'{"prompt":"ab","max_tokens":1}')), Rules())

    def ask_when_done(summary: Summary) -> None:
        if summary.done:
            stop.ask("signal")

    job = Job(lines=items, sink=Writer(out), recorder=RECORDER, progress=ask_when_done, stop=stop)
    summary = run_job(engine, job)
    assert summary.done == 1
    assert len(out.getvalue().splitlines()) == 1


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Heed SIGINT also where the tests run in the background of a shell, which lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_ends_the_process_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number, ends in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)):
        stop = Stop()
        with stopped_by_signals(stop):
            signal.raise_signal(number)
            assert stop.reason == "signal"
            with pytest.raises(ends) as caught:
                signal.raise_signal(number)
        assert number != signal.SIGTERM or caught.value.code == 143
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_that_the_caller_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = Stop()
        with stopped_by_signals(stop):
            signal.raise_signal(signal.SIGINT)
        assert stop.reason is None
    finally:
        signal.signal(signal.SIGINT, before)
