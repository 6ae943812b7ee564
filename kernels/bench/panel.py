"""Decode with and without the live panel, and record what it costs.

python -m bench.panel --out kernels/bench/results/panel-cpu.json
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.record import write_record
from trimkv_cli.cache.retention_cache import RetentionCache
from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.snapshot import CacheSnapshots
from trimkv_cli.events import MemoryUse
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import Request, SamplingParams
from trimkv_cli.ui.live import Panel, Watch
from trimkv_cli.ui.panel import PanelState


class _Screen(io.StringIO):
    """A terminal that shows to nobody."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def decode_tps(engine: Engine, name: str, tokens: int, *, panel: bool) -> float:
    """Generate `tokens` tokens for one request and return how many there were a second, looking on or not."""
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    engine.add(Request(id=name, prompt_token_ids=tuple(range(3, 103)), params=params))
    watch = Panel(_Screen(), lambda: _progress(engine)) if panel else Watch()
    engine.step()
    started = time.perf_counter()
    while engine.has_work:
        engine.step()
        watch.tick()
    return (tokens - 1) / (time.perf_counter() - started)


def redraw_ms(engine: Engine) -> float:
    """Return this thread's time for one redraw while a request runs (median of 50), whatever else the machine does."""
    engine.add(Request(id="redraw", prompt_token_ids=tuple(range(3, 403)), params=SamplingParams(max_tokens=64)))
    engine.step()
    panel, times = Panel(_Screen(), lambda: _progress(engine), every_s=0.0), []
    for _ in range(50):
        started = time.thread_time()
        panel.tick()
        times.append((time.thread_time() - started) * 1e3)
    engine.abort("redraw")
    return median(times)


def _progress(engine: Engine) -> PanelState:
    snapshot, plan = engine.snapshot(), engine.facts.plan
    seen = 0 if snapshot is None else snapshot.seen_tokens
    memory = MemoryUse(
        weights_bytes=engine.facts.weight_bytes,
        gate_bytes=engine.facts.gate_bytes,
        kv_bytes=engine.kv_bytes,
        workspace_bytes=plan.run.workspace_bytes,
        peak_bytes=engine.peak_bytes,
        budget_bytes=plan.budget_bytes,
        seen_tokens=seen,
        full_cache_bytes=plan.run.full_cache_bytes(seen),
    )
    return PanelState(
        memory=memory,
        run=engine.stats,
        snapshot=snapshot,
        evicted=engine.evicted,
        reading=engine.reading,
        elapsed_s=time.monotonic(),
        ttft_s=engine.first_token_s,
    )


def snapshot_ms(*, layers: int, heads: int, slots: int) -> float:
    """Time a look at a cache with a large model's number of slots (median of 20)."""
    cache = RetentionCache(
        rows=1,
        kv_budget=slots,
        num_kv_heads=heads,
        head_dim=1,
        windows=[None] * layers,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.seen[0] = 4 * slots
    for layer in cache.layers:
        layer.slots.position[0] = torch.randint(0, 4 * slots, (heads, slots))
    times = []
    for _ in range(20):
        started = time.perf_counter()
        CacheSnapshots(cache).take(0)
        times.append((time.perf_counter() - started) * 1e3)
    return median(times)


def measure(tokens: int, rounds: int) -> dict[str, Any]:
    """Decode in turns without and with the panel; at one redraw a second, 10 ms are 1 % of the time."""
    engine = load_engine(EngineOptions(threads=torch.get_num_threads(), max_inflight=1))
    decode_tps(engine, "warm", tokens // 4, panel=False)
    rows = [[decode_tps(engine, f"{i}{p}", tokens, panel=p) for p in (False, True)] for i in range(rounds)]
    return {
        "model": "mini",
        "tokens": tokens,
        "rounds": rounds,
        "decode_tps_without": [without for without, _ in rows],
        "decode_tps_with": [with_panel for _, with_panel in rows],
        "redraw_ms": redraw_ms(engine),
        "glance_ms_36_layers_8_heads_4096_slots": snapshot_ms(layers=36, heads=8, slots=4096),
    }


def main() -> None:
    """Measure and print, or write, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    write_record("bench.panel", measure(arguments.tokens, arguments.rounds), arguments.out)


if __name__ == "__main__":
    main()
