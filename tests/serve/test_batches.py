"""Mistakes of files and batches: lines lost or doubled, requests that wait behind them, what a stop leaves."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from helpers.fake_engine import RECORDER
from helpers.fake_engine import run as run_alone
from helpers.serving import Endpoint, Scripted, endpoint
from trimkv_cli.events import TokenEvent
from trimkv_cli.jobs.lines import Rules
from trimkv_cli.serve.batch_work import BatchWork
from trimkv_cli.serve.batches import Batches
from trimkv_cli.serve.completions import Completions
from trimkv_cli.serve.files import Files, FileStore

MOST = 1 << 16
FIXED = replace(RECORDER, reproducible=True)


class Gated(Scripted):
    """Hold requests whose prompt has a "#" in it until the gate is open."""

    def __init__(self, *, is_open: bool, **more: Any) -> None:
        super().__init__(step_s=0.001, **more)
        self.is_open = is_open

    def step(self) -> list[TokenEvent]:
        time.sleep(self.step_s)
        running = self.queue[: self.max_rows]
        return [self._advance(each) for each in running if self.is_open or ord("#") not in each.prompt_token_ids]


def line(name: str, tokens: int = 9, **more: Any) -> dict[str, Any]:
    body = {"prompt": f"line {name}", "max_tokens": tokens, "return_token_ids": True, **more}
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


@dataclass(kw_only=True)
class Open:
    """A server with batches in this process, and a client of it."""

    server: Endpoint
    client: openai.OpenAI
    batches: Batches
    folder: Path

    def start(self, lines: Sequence[Any]) -> Any:
        """Upload lines and start a batch of them."""
        texts = [each if isinstance(each, str) else json.dumps(each) for each in lines]
        stored = self.client.files.create(file=("in.jsonl", "\n".join(texts).encode()), purpose="batch")
        return self.client.batches.create(
            input_file_id=stored.id, endpoint="/v1/completions", completion_window="24h", metadata={"a": "b"}
        )

    def until(self, batch: Any, wanted: Callable[[Any], bool]) -> Any:
        until = time.monotonic() + 30
        while not wanted(found := self.client.batches.retrieve(batch.id)):
            assert time.monotonic() < until, found
            time.sleep(0.01)
        return found

    def over(self, batch: Any) -> Any:
        return self.until(batch, lambda now: now.status in ("completed", "failed", "cancelled"))

    def records(self, *ids: str | None) -> list[dict[str, Any]]:
        texts = [self.client.files.content(each).text for each in ids if each is not None]
        return [json.loads(each) for text in texts for each in text.splitlines()]


Start = Callable[..., AbstractContextManager[Open]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    @contextmanager
    def begin(*, weights: str = "fake", is_open: bool = False, max_rows: int = 3) -> Iterator[Open]:
        made: list[Batches] = []

        def load() -> Gated:
            engine = Gated(is_open=is_open, max_rows=max_rows)
            engine.fingerprint = {"weights": weights}
            return engine

        def others(completions: Completions) -> list[Any]:
            files = Files(store=FileStore(tmp_path / "files"), most_bytes=MOST)
            work = BatchWork(
                worker=completions.worker,
                text=completions.text,
                rules=Rules(),
                recorder=FIXED,
                choices={"deterministic": True},
                run_seed=0,
            )
            made.append(Batches(tmp_path / "batches", files.store, work, bodies=completions.bodies))
            return [*files.routes, *made[0].routes]

        with endpoint(load, others=others) as server, closing(made[0]):
            made[0].start()
            url = f"http://127.0.0.1:{server.port}/v1"
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                yield Open(server=server, client=client, batches=made[0], folder=tmp_path)

    return begin


def by_line(records: Sequence[dict[str, Any]]) -> list[str]:
    return sorted(json.dumps(each) for each in records)


def test_a_batch_is_what_run_writes(start: Start) -> None:
    """Catches answers, refusals or seeds that differ from run's, and failures among the answers."""
    lines = [
        *(line(f"q{i}") for i in range(9)),
        line("two", n=2),
        line("q1"),
        {**line("chat"), "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "x"}]}},
        {"custom_id": "simple", "prompt": "x"},
        "not json",
        line("unknown", tools=3),
        {**line("fails"), "body": {"prompt": "!boom", "max_tokens": 4}},
    ]
    expected, _ = run_alone(lines, recorder=FIXED)
    with start() as server:
        batch = server.start(lines)
        assert (batch.status, batch.metadata, batch.errors) == ("validating", {"a": "b"}, None)
        done = server.over(batch)
        answers, failures = server.records(done.output_file_id), server.records(done.error_file_id)
        counts, metrics = done.request_counts, server.server.metrics()
        listed = [each.id for each in server.client.files.list(purpose="batch_output")]
    assert (done.status, counts.total, counts.completed, counts.failed) == ("completed", 16, 10, 6)
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    assert (metrics["batch_lines_done_total"], metrics["batch_lines_failed_total"]) == (10, 6)
    assert set(listed) == {done.output_file_id, done.error_file_id}
    other = {"chat", "simple"}  # run takes lines of any endpoint
    assert by_line(answers) == by_line(
        [
            each
            for each in expected
            if (each["response"] or {}).get("status_code") == 200 and each["custom_id"] not in other
        ]
    )
    refused = {each["custom_id"] for each in failures if "mismatched_endpoint" in json.dumps(each)}
    assert refused == other
    assert all(each in by_line(expected) for each in by_line(failures) if "mismatched_endpoint" not in each)


def test_requests_do_not_wait_behind_a_batch(start: Start) -> None:
    """Catches a request that gets its row only when lines of a batch have ended, and lines that this costs tokens."""
    lines = [line(f"#{i}") for i in range(6)]
    expected, _ = run_alone(lines, recorder=FIXED)
    with start(max_rows=2) as server:
        batch = server.start(lines)
        server.until(batch, lambda now: server.server.metrics()["requests_running"] == 2)
        for count in range(3):
            assert server.server.chat(max_tokens=3 + count).status_code == 200
        assert server.client.batches.retrieve(batch.id).request_counts.completed == 0
        assert server.server.engine.aborted
        server.server.engine.is_open = True
        done = server.over(batch)
        assert by_line(server.records(done.output_file_id)) == by_line(expected)


def test_a_cancelled_batch_keeps_what_was_answered(start: Start) -> None:
    """Catches a cancel that waits for rows or for other batches, loses answers, or leaves lines running."""
    with start(max_rows=2) as server:
        first = server.start([line(f"{'q' if i < 4 else '#'}{i}") for i in range(8)])
        second = server.start([line("never")])
        assert server.client.batches.cancel(second.id).status == "cancelling"
        assert server.over(second).status == "cancelled"
        server.until(first, lambda now: now.request_counts.completed == 4)
        server.client.batches.cancel(first.id)
        done = server.over(first)
        assert (done.status, done.request_counts.completed) == ("cancelled", 4)
        assert {each["custom_id"] for each in server.records(done.output_file_id)} == {"q0", "q1", "q2", "q3"}
        server.server.settled(lambda now: now["requests_running"] == now["requests_waiting"] == 0)
        with pytest.raises(openai.ConflictError):
            server.client.batches.cancel(first.id)
        assert server.over(server.start([line("next")])).status == "completed"
        assert [each.name for each in (server.folder / "batches").iterdir() if each.suffix != ".json"] == []


def test_a_stopped_server_leaves_a_batch_to_the_next(start: Start) -> None:
    """Catches lines lost or answered twice over a stop, other seeds after it, and two servers at one batch."""
    lines = [line(f"{'q' if i < 4 else '#'}{i}") for i in range(12)]
    expected, _ = run_alone(lines, recorder=FIXED)
    with start() as server:
        batch = server.start(lines)
        server.until(batch, lambda now: now.request_counts.completed == 4)
        with start() as other:
            with pytest.raises(openai.ConflictError, match="another server"):
                other.client.batches.cancel(batch.id)
            assert other.server.engine.ran == []
        server.server.worker.end_all()  # the time that it had to end is over
    with start(is_open=True) as server:
        done = server.over(batch)
        assert by_line(server.records(done.output_file_id)) == by_line(expected)
        assert (len(server.server.engine.ran), done.request_counts.completed) == (8, 12)


def test_another_model_does_not_go_on_with_a_batch(start: Start) -> None:
    """Catches answers of two models in one file."""
    with start() as server:
        batch = server.start([line(f"{'q' if i < 4 else '#'}{i}") for i in range(12)])
        queued = server.start([line("later")])
        server.until(batch, lambda now: now.request_counts.completed == 4)
        server.until(queued, lambda now: now.status == "in_progress")
    with start(weights="other", is_open=True) as server:
        done = server.over(batch)
        assert (done.status, server.over(queued).status) == ("failed", "failed")
        assert server.server.engine.ran == []
        assert done.errors.data[0].code == "model_changed"
        assert "weights (fake before, other now)" in done.errors.data[0].message
        assert len(server.records(done.output_file_id)) == done.request_counts.completed == 4


def test_what_a_kill_left_half_written_is_written_again(start: Start) -> None:
    """Catches a batch that stays in finalizing for ever, or whose results are doubled."""
    with start() as server:
        batch = server.over(server.start([line("a"), line("b")]))
        path = server.folder / "batches" / f"{batch.id}.json"
        records = server.client.files.content(batch.output_file_id).content
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "finalizing", "completed_at": None}))
    path.with_suffix(".jsonl").write_bytes(records + b'{"torn')
    (server.folder / "files" / f"{batch.output_file_id}.json").unlink()
    with start() as server:
        again = server.over(batch)
        assert (again.status, again.output_file_id) == ("completed", batch.output_file_id)
        assert server.client.files.content(again.output_file_id).content == records


def test_what_cannot_be_stored_is_no_batch(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a full disk that leaves half of a batch, or a path of the server in what a client is told."""
    with start() as server:
        first = server.start([line("#a")])
        server.until(first, lambda now: server.server.metrics()["requests_running"] == 1)
        with monkeypatch.context() as patch:
            patch.setattr("trimkv_cli.serve.batches.whole_file", _full)
            with pytest.raises(openai.InternalServerError, match="cannot be stored") as refused:
                server.start([line("b")])
            assert str(server.folder) not in str(refused.value)
            assert [each.id for each in server.client.batches.list()] == [first.id]
            server.server.engine.is_open = True
            assert server.over(first).errors.data[0].code == "server_error"
        monkeypatch.setattr("trimkv_cli.serve.files.sync", _full)
        with pytest.raises(openai.InternalServerError, match="cannot be stored"):
            server.client.files.create(file=("a.jsonl", b"x"), purpose="batch")
        assert not [path.name for path in (server.folder / "files").iterdir() if path.suffix == ".partial"]
    monkeypatch.undo()
    with start() as server:  # now there is room
        assert server.over(first).status == "completed"


def _full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_nothing_lies_open(start: Start) -> None:
    """Catches files of clients that other users can read."""
    with start() as server:
        server.over(server.start([line("a"), "broken"]))
        found = [
            path for name in ("files", "batches") for path in (server.folder / name, *(server.folder / name).iterdir())
        ]
    assert {path.stat().st_mode & 0o777 for path in found if path.is_dir()} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in found if path.is_file()} == {0o600}


def test_what_makes_no_sense_is_refused(start: Start) -> None:
    """Catches ids that are paths, pages without an end, batches of nothing, and words that are passed over."""
    with start() as server:
        http, folder = server.server.client, server.folder
        (folder / "secret.json").write_text("{}")
        for id in (
            "..%2fsecret",
            "../secret",
            "..",
            "file-" + "0" * 32,
            "file-%00",
            "file-" + "G" * 32,
            "%2e%2e%2fsecret",
        ):
            for method, path in [("GET", ""), ("DELETE", ""), ("GET", "/content")]:
                assert http.request(method, f"/v1/files/{id}{path}").status_code in (404, 405), (method, id)
            for method, path in [("GET", ""), ("POST", "/cancel")]:
                assert http.request(method, f"/v1/batches/{id}{path}").status_code in (404, 405), (method, id)
        assert (folder / "secret.json").exists()
        stored = server.client.files.create(file=("a.jsonl", b"\n\n"), purpose="batch")
        good = {"input_file_id": stored.id, "endpoint": "/v1/completions", "completion_window": "24h"}
        for wrong, param in [
            ({"input_file_id": "file-x"}, "input_file_id"),
            ({"endpoint": "/v1/embeddings"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"),
            ({"metadata": {"a": "b" * 513}}, "metadata.a"),
            ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "output_expires_after"),
        ]:
            said = http.post("/v1/batches", json={**good, **wrong})
            assert said.status_code in (400, 404)
            assert said.json()["error"]["param"] == param
        assert http.post("/v1/batches", json=[]).status_code == 400
        empty = server.over(server.client.batches.create(**good))
        assert (empty.status, empty.errors.data[0].code) == ("failed", "empty_file")
        for query in ("limit=0", "limit=x", "order=up", "limit=99999999999"):
            assert http.get(f"/v1/files?{query}").status_code == 400
        assert http.get("/v1/batches?limit=101").status_code == 400
        assert http.get(f"/v1/files?after={empty.id}").status_code == 404


def test_files_are_listed_page_by_page_and_deleted(start: Start) -> None:
    """Catches pages that lose or repeat files, and content that stays after its file is deleted."""
    with start() as server:
        files = server.client.files
        ids = [files.create(file=("a.jsonl", b"x"), purpose="batch").id for _ in range(5)]
        assert [each.id for each in files.list(limit=2, order="asc")] == ids
        assert [each.id for each in files.list(limit=2)] == ids[::-1]
        assert list(files.list(purpose="batch_output")) == []
        assert files.delete(ids[0]).deleted
        with pytest.raises(openai.NotFoundError):
            files.content(ids[0])
        assert len(list((server.folder / "files").iterdir())) == 8
        batches = [server.start([line("a")]).id for _ in range(3)]
        assert [each.id for each in server.client.batches.list(limit=2)] == batches[::-1]


def test_an_upload_that_does_not_arrive_leaves_nothing(start: Start) -> None:
    """Catches parts of files that stay on the disk after a refusal, or a client that goes away."""
    with start() as server:
        with pytest.raises(openai.APIStatusError) as refused:
            server.client.files.create(file=("a.jsonl", b"x" * (MOST + 1)), purpose="batch")
        assert refused.value.status_code == 413

        def half() -> Iterator[bytes]:
            yield b'--xyz\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 1000
            raise ConnectionAbortedError

        kind = {"content-type": "multipart/form-data; boundary=xyz", "content-length": "5000"}
        with pytest.raises(ConnectionAbortedError):
            httpx.post(f"http://127.0.0.1:{server.server.port}/v1/files", content=half(), headers=kind)
        files, until, last = server.folder / "files", time.monotonic() + 10, time.monotonic()
        while time.monotonic() < min(last + 0.5, until):  # the server may not have begun yet
            last = time.monotonic() if list(files.iterdir()) else last
            time.sleep(0.01)
        assert list(files.iterdir()) == []
