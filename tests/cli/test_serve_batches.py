"""Mistakes of batches that only a real model and a real kill bring out."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from helpers.programs import Run
from helpers.serving import Served, served

OPTIONS = ("--deterministic", "--kv-budget", "48", "--threads", "1", "--rows", "2")


def client_of(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI) -> None:
    """Ask something beside a batch, which takes a row back from it."""
    said: Any = [{"role": "user", "content": "hello"}]
    assert client.chat.completions.create(model="mini", messages=said, max_tokens=2).usage is not None


def until(client: openai.OpenAI, batch: str, enough: int) -> Any:
    """Wait until so many lines have an answer, or the batch is over."""
    end = time.monotonic() + 120
    while (found := client.batches.retrieve(batch)).status in ("validating", "in_progress", "finalizing"):
        assert time.monotonic() < end, found
        if found.request_counts.completed >= enough:
            break
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_a_batch_outlives_a_kill(here: Run, tmp_path: Path) -> None:
    """Catches lines that a kill -9 loses or doubles, and answers that differ from those of `trimkv run`."""
    lines = [
        {
            "custom_id": f"q{count}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "messages": [{"role": "user", "content": f"The code of box {count} is {count * 37}. Which code?"}],
                "max_tokens": 4 if count < 2 else 50,
                "temperature": 0.9,
                "ignore_eos": True,
            },
        }
        for count in range(6)
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join([*map(json.dumps, lines), "not json"]))
    environment = {"XDG_DATA_HOME": str(tmp_path / "data")}
    with served(tmp_path, *OPTIONS, environment=environment) as server, client_of(server) as client:
        stored = client.files.create(file=source, purpose="batch")
        batch = client.batches.create(
            input_file_id=stored.id, endpoint="/v1/chat/completions", completion_window="24h"
        ).id
        assert until(client, batch, 2).status == "in_progress"
        ask(client)
        assert client.batches.retrieve(batch).status == "in_progress"
        server.process.kill()
        server.process.wait()
    with served(tmp_path, *OPTIONS, environment=environment) as server, client_of(server) as client:
        ask(client)
        done = until(client, batch, 99)
        assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 6, 1)
        found = [client.files.content(id).text for id in (done.output_file_id, done.error_file_id) if id is not None]
        left = client.batches.create(
            input_file_id=stored.id, endpoint="/v1/chat/completions", completion_window="24h"
        ).id
        assert until(client, left, 1).status == "in_progress"
        assert server.end(signal.SIGTERM, within_s=20)[0] == 0  # of the 30 s that requests may take
    state = json.loads((tmp_path / "data" / "trimkv" / "serve" / "batches" / f"{left}.json").read_text())
    assert state["status"] == "in_progress"
    assert here("run", source, *OPTIONS, "-o", tmp_path / "out.jsonl", "--quiet").returncode == 3
    assert sorted("".join(found).splitlines()) == sorted((tmp_path / "out.jsonl").read_text().splitlines())
