"""Mistakes under a crowd: answers that are lost or mixed up, rows that stay taken. The long one: bench.serve_load."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import httpx

from helpers.serving import Endpoint, endpoint
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions


def load() -> Any:
    options = EngineOptions(
        model="mini", kv_budget="64", prefill_chunk=32, max_inflight=3, threads=1, deterministic=True
    )
    return load_engine(options)


def ask(served: Endpoint, number: int) -> list[int] | None:
    """Ask with the number's own length and seed; every third client leaves at some moment."""
    rng = Random(number)
    body = {
        "messages": [{"role": "user", "content": f"My number is {number}."}],
        "max_tokens": round(40 ** rng.random()),
        "seed": number,
        "temperature": 2.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    with httpx.Client(base_url=f"http://127.0.0.1:{served.port}") as client:
        try:
            patience = rng.random() if number % 3 == 0 else 60
            response = client.post("/v1/chat/completions", json=body, timeout=patience)
        except httpx.TimeoutException:
            return None
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    ids: list[int] = choice["token_ids"]
    assert (len(ids), choice["finish_reason"]) == (body["max_tokens"], "length")
    return ids


def test_a_crowd_over_three_rows_gets_what_each_would_get_alone() -> None:
    """Catch an answer that is lost, another's, or changed by what runs beside it; rows and places not given back."""
    with endpoint(load, kept=1) as served:
        with ThreadPoolExecutor(12) as pool:
            said = list(pool.map(lambda number: ask(served, number), range(45)))
        now = served.settled(lambda now: now["requests_running"] + now["requests_waiting"] == 0)
        assert served.worker._busy == 0
        assert now["kept_conversations"] <= 4
        assert all(ids is not None for number, ids in enumerate(said) if number % 3)
        for number in range(1, 45, 10):
            if said[number] is not None:
                assert ask(served, number) == said[number]
