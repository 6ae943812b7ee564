"""Count how often a system prompt that many lines share is read, and what that does to the time to the first token.

python -m bench.shared_prefix --out kernels/bench/results/shared-prefix-mini.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.record import write_record
from trimkv_cli.engine.engine import Engine
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import Request, SamplingParams

_SENTENCE = "The garden behind the old house is quiet. "


def make_requests(engine: Engine, count: int, *, system_tokens: int) -> list[Request]:
    """Render `count` questions below one system message of at least `system_tokens` tokens."""
    text = engine.text
    assert text is not None, "the model needs a chat template"
    per_sentence = len(text.encode(_SENTENCE * 2)) - len(text.encode(_SENTENCE))
    repeats = 1 + system_tokens // per_sentence
    system = {"role": "system", "content": _SENTENCE * repeats}
    requests = []
    for i in range(count):
        prompt = text.render_chat([system, {"role": "user", "content": f"I have {i} cards. How many do I have?"}])
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        requests.append(
            Request(id=str(i), prompt_token_ids=prompt.token_ids, params=params, prefix_len=prompt.prefix_len)
        )
    return requests


def measure(engine: Engine, requests: Sequence[Request]) -> dict[str, Any]:
    """Run all; count the prompt tokens that were read, and time first tokens from when a request got its row."""
    before = engine.stats
    finished = [event.stats for event in engine.generate(requests) if event.stats is not None]
    after = engine.stats
    waits = [stats.ttft_s - stats.queue_s for stats in finished if stats.ttft_s is not None]
    return {
        "prompt_tokens": sum(stats.prompt_tokens for stats in finished),
        "tokens_read": after.prefill_tokens - before.prefill_tokens,
        "tokens_copied": after.shared_prefix_tokens - before.shared_prefix_tokens,
        "lines_that_copied": sum(stats.shared_prefix_tokens > 0 for stats in finished),
        "prefill_s": after.prefill_s - before.prefill_s,
        "ttft_ms_p50": median(waits) * 1e3,
        "ttft_ms_max": max(waits) * 1e3,
    }


def main() -> None:
    """Measure with and without sharing and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--system-tokens", type=int, default=1000)
    parser.add_argument("--kv-budget", default="128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    engine = load_engine(EngineOptions(model=arguments.model, kv_budget=arguments.kv_budget, threads=arguments.threads))
    requests = make_requests(engine, arguments.lines, system_tokens=arguments.system_tokens)
    shared = measure(engine, requests)
    # Each with a prefix of its own kind: the boundary stays, nothing is shared.
    apart = measure(engine, [replace(request, id=f"apart-{request.id}", prefix_len=0) for request in requests])
    measured = {
        "model": arguments.model,
        "lines": arguments.lines,
        "prefix_tokens": requests[0].prefix_len,
        "kv_budget": arguments.kv_budget,
        "rows": engine.max_rows,
        "shared": shared,
        "apart": apart,
        "times_the_prefix_was_read": arguments.lines - shared["lines_that_copied"],
    }
    write_record("bench.shared_prefix", measured, arguments.out)


if __name__ == "__main__":
    main()
