"""Mistakes of the rows that a batch borrows: answers lost, doubled or mixed up when a row is taken back."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from helpers.fake_engine import RECORDER, FakeEngine, FakeText
from helpers.fake_engine import run as run_alone
from trimkv_cli.errors import TrimkvError
from trimkv_cli.jobs.job import Job, run_job
from trimkv_cli.jobs.lines import Rules
from trimkv_cli.jobs.reading import LineReader
from trimkv_cli.jobs.selection import parse_lines
from trimkv_cli.jobs.writing import Writer
from trimkv_cli.serve.rows import SpareRows
from trimkv_cli.serve.worker import Ticket

LINES = [
    *({"custom_id": f"q{i}", "prompt": f"line {i}", "max_tokens": 9, "return_token_ids": True} for i in range(7)),
    {"custom_id": "two", "prompt": "twice", "max_tokens": 5, "n": 2},
    {"custom_id": "fails", "prompt": "!boom", "max_tokens": 5},
    {"custom_id": "long", "prompt": "x", "max_tokens": 2000},
]


class ScriptedWorker:
    """Answer each ticket while it is submitted: take its row back so many times in the middle, or fail it."""

    def __init__(self, *, taken_back: int = 0, faults: int = 0) -> None:
        self.engine = FakeEngine(text=FakeText())
        self.taken_back, self.faults = taken_back, faults
        self.ids: list[str] = []
        self.cancelled: list[Ticket] = []

    def ask(self, question: Any) -> Any:
        from concurrent.futures import Future

        answer: Future[Any] = Future()
        try:
            answer.set_result(question(self.engine))
        except TrimkvError as error:
            answer.set_exception(error)
        return answer

    def submit(self, ticket: Ticket) -> None:
        assert ticket.batch
        if self.faults:
            self.faults -= 1
            ticket.fail(ValueError("the engine broke"))
            return
        request = ticket.make(self.engine, None)  # type: ignore[arg-type]
        assert request is not None
        self.ids.append(request.id)
        for last in [*[False] * self.taken_back, True]:
            self.engine.made.pop(request.id, None)
            self.engine.add(request)
            ticket.begun(False)
            for _ in range(10_000 if last else 2):
                if not self.engine.queue:
                    break
                for event in self.engine.step():
                    ticket.take(event)
            if not last and self.engine.queue:
                self.engine.abort(request.id)
                ticket.restarted()
            elif not self.engine.queue:
                return

    def cancel(self, ticket: Ticket) -> None:
        self.cancelled.append(ticket)


def run_over(worker: ScriptedWorker, lines: Sequence[Any]) -> list[dict[str, Any]]:
    out = io.BytesIO()
    items = parse_lines(LineReader(io.BytesIO("\n".join(map(json.dumps, lines)).encode())), Rules())
    rows = SpareRows(worker, FakeText(), name="batch")  # type: ignore[arg-type]
    run_job(rows, Job(lines=items, sink=Writer(out, order="input"), recorder=replace(RECORDER, reproducible=True)))
    rows.close()
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("taken_back", [0, 2])
def test_rows_taken_back_change_no_answer(taken_back: int) -> None:
    """Catches tokens of a row that was taken back being counted, or refusals and failures that differ from run's."""
    worker = ScriptedWorker(taken_back=taken_back)
    expected, _ = run_alone(LINES, order="input", recorder=replace(RECORDER, reproducible=True))
    assert run_over(worker, LINES) == expected
    assert all(each.startswith("batch/line-") for each in worker.ids)  # an interactive request may be a line-1 too


def test_what_failed_through_no_fault_of_its_own_is_tried_again() -> None:
    """Catches a fault of the engine, which another request may have brought about, ending lines of a batch."""
    expected, _ = run_alone(LINES, order="input", recorder=replace(RECORDER, reproducible=True))
    assert run_over(ScriptedWorker(faults=1), LINES) == expected


def test_an_engine_that_fails_whatever_it_gets_ends_the_job() -> None:
    """Catches a model that is gone marking every line of a batch as failed, one by one."""
    with pytest.raises(TrimkvError, match="the engine broke"):
        run_over(ScriptedWorker(faults=10_000), LINES)
