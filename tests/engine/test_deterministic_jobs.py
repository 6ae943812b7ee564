"""With --deterministic a line's record is the same bytes whatever runs beside it, before it or after a restart."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from trimkv_cli.engine.engine import Engine
from trimkv_cli.jobs.job import Job, run_job
from trimkv_cli.jobs.lines import Rules
from trimkv_cli.jobs.reading import LineReader
from trimkv_cli.jobs.records import Recorder
from trimkv_cli.jobs.selection import Selection, Shard, parse_lines, scan
from trimkv_cli.jobs.writing import Writer
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions

SYSTEMS = ["Be brief and kind. " * 6, "Answer in a long sentence, please. " * 4]
FORMAT = {"type": "json_schema", "json_schema": {"schema": {"type": "array", "items": {"type": "boolean"}}}}


def line(number: int) -> dict[str, Any]:
    """Vary everything that could tell neighbours: shared prefixes, lengths, copies, penalties, formats, scores."""
    user = {"role": "user", "content": f"I have {number} cards. " * (1 + number % 4)}
    system = {"role": "system", "content": SYSTEMS[number % 2]}
    more: dict[str, Any] = [
        {"n": 3},
        {"logprobs": True, "top_logprobs": 2},
        {"presence_penalty": 1.0, "repetition_penalty": 1.3},
        {"response_format": FORMAT},
        {"stop": ["e"], "logit_bias": {"5": 2}},
    ][number % 5]
    body = {"messages": [system, user], "max_tokens": 3 + number % 9, "temperature": 0.9, **more}
    return {"custom_id": f"r{number}", "url": "/v1/chat/completions", "body": body}


DATA = "\n".join(json.dumps(line(number)) for number in range(14)).encode()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(EngineOptions(model="mini", kv_budget="24", prefill_chunk=16, deterministic=True, threads=1))


def records(engine: Engine, **selection: Any) -> list[bytes]:
    out = io.BytesIO()
    recorder = Recorder(model="mini", run_seed=0, kv_budget=24, prefill_chunk=16, reproducible=True)
    items = parse_lines(LineReader(io.BytesIO(DATA)), Rules(), Selection(**selection))
    run_job(engine, Job(lines=items, sink=Writer(out), recorder=recorder))
    return out.getvalue().splitlines()


def test_shards_restarts_and_company_leave_every_byte_as_it_is(engine: Engine) -> None:
    whole = records(engine)
    assert len(whole) == 14
    assert all(json.loads(record)["response"]["status_code"] == 200 for record in whole)
    shards = [record for index in (1, 2, 3) for record in records(engine, shard=Shard(index=index, of=3))]
    assert sorted(shards) == sorted(whole)
    earlier = scan(whole[:5], "out")
    assert sorted(whole[:5] + records(engine, earlier=earlier)) == sorted(whole)
    alone = [record for number in range(1, 15) for record in records(engine, shard=Shard(index=number, of=14))]
    assert sorted(alone) == sorted(whole)
