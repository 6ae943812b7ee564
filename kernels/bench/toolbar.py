"""Measure what the passing line of a chat costs: its own share of the time, and tokens per second with and without it.

python -m bench.toolbar --out kernels/bench/results/toolbar-cpu.json
"""

from __future__ import annotations

import argparse
import os
import pty
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import BinaryIO

from bench.record import write_record
from trimkv_cli.engine.engine import Engine
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import Request, SamplingParams
from trimkv_cli.ui.chat.answer import AnswerView, Meter
from trimkv_cli.ui.chat.screen import Screen
from trimkv_cli.ui.look import Look


def answer(engine: Engine, stream: BinaryIO, *, moves: bool, tokens: int) -> tuple[float, float]:
    """Show an answer of `tokens` tokens on a terminal as chat does; return its seconds, and those of the line."""
    screen = Screen(lambda: Look(width=80, colour=True), moves=moves, stream=stream)
    view = AnswerView(screen)
    meter = Meter(screen, view, seen=0, slots=engine.facts.plan.run.kv_budget, interval_s=1.0)
    params = SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True)
    engine.add(Request(id="bench", prompt_token_ids=(1, 2, 3), params=params))
    line_s, started = 0.0, time.perf_counter()
    while engine.has_work:
        for event in engine.step():
            view.push(event.text)
            meter.generated += len(event.token_ids)
        before = time.perf_counter()
        if meter.due:
            meter.draw((engine.stats.prefill_tokens, 3))
        line_s += time.perf_counter() - before
    view.close()
    return time.perf_counter() - started, line_s


@contextmanager
def terminal() -> Iterator[BinaryIO]:
    """Open a pseudo-terminal that somebody reads."""
    main, side = pty.openpty()

    def drain() -> None:
        try:
            while os.read(main, 65536):
                pass
        except OSError:  # how Linux says that the other side is closed
            pass

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    with os.fdopen(side, "wb", buffering=0) as stream:
        yield stream
    reader.join(timeout=5)
    os.close(main)


def main() -> None:
    """Read the arguments, measure in turns and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    engine = load_engine(EngineOptions(kv_budget="64", max_inflight=1))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    shares: list[float] = []
    with terminal() as stream:
        answer(engine, stream, moves=True, tokens=200)
        for turn in range(arguments.rounds):
            for moves in (True, False) if turn % 2 else (False, True):
                whole_s, line_s = answer(engine, stream, moves=moves, tokens=arguments.tokens)
                seconds[moves].append(whole_s)
                shares += [line_s / whole_s] if moves else []
    rates = {moves: [round(arguments.tokens / s, 1) for s in each] for moves, each in seconds.items()}
    measured = {
        "model": engine.facts.model_id,
        "kv_budget": engine.facts.plan.run.kv_budget,
        "tokens": arguments.tokens,
        "tps_with": rates[True],
        "tps_without": rates[False],
        "median_tps_with": round(median(rates[True]), 1),
        "median_tps_without": round(median(rates[False]), 1),
        "share_of_time_p50": round(median(shares), 6),
        "share_of_time_max": round(max(shares), 6),
    }
    write_record("bench.toolbar", measured, arguments.out)


if __name__ == "__main__":
    main()
