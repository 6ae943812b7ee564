"""Record how long the first token of a turn takes when clients send whole histories, and what a server then holds.

python -m bench.serve_turns --out kernels/bench/results/serve-turns-mini.json

Conversations of thirty turns take turns with each other, so that each one's row may have been put aside in between.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import httpx

from bench.record import write_record
from bench.served import Served, pieces, served
from trimkv_cli.mini.language import Talk

_ANSWER = 12  # tokens


def texts(seed: int, turns: int, sentences: int) -> list[str]:
    """Draw what a user says, about equally long each time."""
    rng = Random(f"bench serve turns {seed}")
    said: list[str] = []
    while len(said) < turns:
        talk = Talk(rng)
        for _ in range(sentences):
            talk.chat()
        said.append(" ".join(message.content for message in talk.messages))
    return said


def turn(served: Served, client: httpx.Client, messages: list[dict[str, str]]) -> dict[str, Any]:
    """Run one turn; return its times, and what of it was read."""
    body = {"messages": messages, "max_tokens": _ANSWER, "temperature": 0, "ignore_eos": True, "stream": True}
    started, first, said, tail = time.perf_counter(), 0.0, "", {}
    url = f"{served.url}/v1/chat/completions"
    with client.stream("POST", url, json={**body, "stream_options": {"include_usage": True}}) as response:
        for chunk in pieces(response):
            for choice in chunk["choices"]:
                text = choice["delta"].get("content", "")
                first = first or (time.perf_counter() - started if text else 0.0)
                said += text
            tail = chunk
        cache = response.headers["x-trimkv-cache"]
    messages.append({"role": "assistant", "content": said})
    usage = tail["usage"]
    read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    return {"ttft_s": first, "prompt_tokens": usage["prompt_tokens"], "read_tokens": read, "cache": cache}


def measure(arguments: Sequence[str], *, conversations: int, turns: int, sentences: int) -> dict[str, Any]:
    """Return the medians of each turn over all conversations."""
    scripts = [texts(seed, turns, sentences) for seed in range(conversations)]
    histories: list[list[dict[str, str]]] = [[] for _ in scripts]
    rows = []
    with served(arguments) as server, httpx.Client(timeout=600) as client:
        for number in range(turns):
            told = []
            for script, messages in zip(scripts, histories, strict=True):
                messages.append({"role": "user", "content": script[number]})
                told.append(turn(server, client, messages))
            median = {key: statistics.median(each[key] for each in told) for key in ("ttft_s", "prompt_tokens")}
            read = statistics.median(each["read_tokens"] for each in told)
            rows.append(
                {
                    "turn": number + 1,
                    **median,
                    "read_tokens": read,
                    "ttft_ms_per_token_read": 1000 * median["ttft_s"] / read,
                    "continued": sum(each["cache"] == "continued" for each in told),
                    "anon_bytes": server.resident("RssAnon"),
                }
            )
        metrics = server.metrics()
    return {
        "turns": rows,
        "ttft_ratio": rows[-1]["ttft_s"] / rows[1]["ttft_s"],
        "anon_growth_bytes": rows[-1]["anon_bytes"] - rows[1]["anon_bytes"],
        "metrics": {key: metrics[key] for key in ("kv_bytes", "kept_bytes", "peak_bytes", "planned_bytes")},
    }


def main() -> None:
    """Measure going on, and for comparison reading everything again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--conversations", type=int, default=4)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--sentences", type=int, default=3)
    parser.add_argument("--kv-budget", default="128")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    common = [asked.model, "--kv-budget", asked.kv_budget, "--prefill-chunk", "32", "--threads", "1", "--rows", "2"]
    sizes = {"conversations": asked.conversations, "turns": asked.turns, "sentences": asked.sentences}
    measured = {
        "measured": f"{asked.conversations} conversations in 2 rows, answers of {_ANSWER} tokens, medians of each turn",
        "model": asked.model,
        "kv_budget": asked.kv_budget,
        "continue": measure(common, **sizes),
        "no_continue": measure([*common, "--no-continue"], **sizes),
    }
    write_record("bench.serve_turns", measured, asked.out)


if __name__ == "__main__":
    main()
