"""Record what a server does with 200 requests from 32 connections over 3 rows, a third of them cancelled half-way.

python -m bench.serve_load --out kernels/bench/results/serve-load-mini.json

Answers are of 1 to 3,000 tokens, log-uniform, each with a seed of its own. The budget is the smallest that starts;
some answers are asked for once more, alone, and must say the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx

from bench.record import write_record
from bench.served import Served, served

_LONGEST = 3000
_AGAIN = 8  # answers that are asked for once more


@dataclass(slots=True, kw_only=True)
class Asked:
    """One request, and what came of it."""

    number: int
    max_tokens: int
    stream: bool
    leaves_s: float | None  # after so many seconds
    token_ids: list[int] = field(default_factory=list)
    outcome: str = "lost"

    @property
    def body(self) -> dict[str, Any]:
        return {
            "messages": [{"role": "user", "content": f"My number is {self.number}. Tell me a story."}],
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "seed": self.number,
            "stream": self.stream,
            "return_token_ids": True,
        }

    async def run(self, client: httpx.AsyncClient) -> None:
        """Ask, and leave when it is time."""
        try:
            async with asyncio.timeout(self.leaves_s):
                await self._ask(client)
        except TimeoutError:
            self.outcome = "cancelled"

    async def _ask(self, client: httpx.AsyncClient) -> None:
        self.token_ids = []
        async with client.stream("POST", "/v1/chat/completions", json=self.body) as response:
            if response.status_code != 200:
                await response.aread()
                self.outcome = str(response.status_code)
                return
            if self.stream:
                lines = [line async for line in response.aiter_lines() if line.startswith("data: {")]
                bodies = [json.loads(line.removeprefix("data: ")) for line in lines]
            else:
                bodies = [json.loads(await response.aread())]
        choices = [choice for body in bodies for choice in body["choices"]]
        self.token_ids = [token for choice in choices for token in choice.get("token_ids", [])]
        right = len(self.token_ids) == self.max_tokens and choices[-1]["finish_reason"] == "length"
        self.outcome = "finished" if right else "wrong"


def draw(count: int, longest: int, slow_s: float) -> list[Asked]:
    """Draw requests; every third leaves, most of them while it waits or runs."""
    rng = Random("bench serve load")
    return [
        Asked(
            number=number,
            max_tokens=round(longest ** rng.random()),
            stream=rng.random() < 0.5,
            leaves_s=rng.random() * slow_s if number % 3 == 0 else None,
        )
        for number in range(count)
    ]


async def load(server: Served, asked: list[Asked], connections: int) -> dict[str, Any]:
    """Ask everything from so many connections; return what came of it."""
    coming = iter(asked)
    limits = httpx.Limits(max_connections=None)
    started = time.perf_counter()
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as client:

        async def connection() -> None:
            for each in coming:
                await each.run(client)

        await asyncio.gather(*(connection() for _ in range(connections)))
        elapsed = time.perf_counter() - started
        freed = await _freed_s(server)
        finished = [each for each in asked if each.outcome == "finished"]
        again = sorted(finished, key=lambda each: each.max_tokens)[:: max(1, len(finished) // _AGAIN)]
        differ = 0
        for each in again:
            before = each.token_ids
            await each._ask(client)
            differ += each.token_ids != before
    return {
        "elapsed_s": elapsed,
        "outcomes": dict(Counter(each.outcome for each in asked)),
        "tokens_of_finished": sum(len(each.token_ids) for each in finished),
        "asked_again": len(again),
        "of_these_differ": differ,
        "rows_free_after_s": freed,
    }


async def _freed_s(server: Served) -> float:
    """Let a long answer run, leave, and return how long its row is still taken: a metric is read a step later."""
    times = []
    for number in range(5):
        one = Asked(number=number, max_tokens=_LONGEST, stream=True, leaves_s=1.0)
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            await one.run(client)
        started = time.perf_counter()
        while (await asyncio.to_thread(server.metrics))["requests_running"]:
            pass
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def smallest_budget(arguments: list[str]) -> int:
    """Return the smallest budget that starts: what a refusal says is needed."""
    try:
        with served([*arguments, "-b", "100MiB"]):
            return 100 << 20
    except RuntimeError as error:
        found = re.search(r"--budget (\d+)", str(error))
        if found is None:
            raise
        return int(found[1])


def main() -> None:
    """Measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--longest", type=int, default=_LONGEST)
    parser.add_argument("--slow", type=float, default=20.0, help="the longest time after which a client leaves")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    arguments = [asked.model, "--kv-budget", "64", "--prefill-chunk", "32", "--threads", "1", "--rows", "3"]
    arguments += ["--deterministic"]
    budget = smallest_budget(arguments)
    with served([*arguments, "-b", str(budget)]) as server:
        came = asyncio.run(load(server, draw(asked.requests, asked.longest, asked.slow), asked.connections))
        metrics = server.metrics()
        peak = server.resident()
    measured = {
        "measured": f"{asked.requests} requests of 1 to {asked.longest} tokens from {asked.connections} connections",
        "model": asked.model,
        **came,
        "tokens_generated": metrics["completion_tokens_total"],
        "budget_bytes": budget,
        "planned_bytes": metrics["planned_bytes"],
        "peak_bytes": peak,
        "held": peak <= min(budget, metrics["planned_bytes"]),
    }
    write_record("bench.serve_load", measured, asked.out)


if __name__ == "__main__":
    main()
