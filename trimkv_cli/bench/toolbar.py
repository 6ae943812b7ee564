"""Measure what the passing line of a chat costs: tokens per second with it and without it, in turns.

python -m trimkv_cli.bench.toolbar --out kernels/bench/results/toolbar-cpu.json
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

from trimkv_cli.bench.record import write_record
from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.loader import load_engine
from trimkv_cli.engine.options import EngineOptions
from trimkv_cli.engine.request import Request, SamplingParams
from trimkv_cli.ui.chat.answer import AnswerView
from trimkv_cli.ui.chat.meter import Meter
from trimkv_cli.ui.chat.screen import Screen
from trimkv_cli.ui.look import Look


def decode_tps(engine: Engine, stream: BinaryIO, *, moves: bool, tokens: int) -> float:
    """Show an answer of `tokens` tokens on a terminal as chat does, and return its tokens per second."""
    screen = Screen(lambda: Look(width=80, colour=True), moves=moves, stream=stream)
    view = AnswerView(screen)
    meter = Meter(screen, view, seen=0, slots=engine.facts.plan.kv_budget, interval_s=1.0)
    params = SamplingParams(max_tokens=tokens, temperature=1.0, ignore_eos=True)
    engine.add(Request(id="bench", prompt_token_ids=(1, 2, 3), params=params))
    started = 0.0
    while engine.has_work:
        for event in engine.step():
            view.push(event.text)
            meter.generated += len(event.token_ids)
        if meter.due:
            meter.draw(read=engine.stats.prefill_tokens, to_read=3)
        started = started or time.perf_counter()
    view.close()
    return (tokens - 1) / (time.perf_counter() - started)


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
    rates: dict[bool, list[float]] = {True: [], False: []}
    with terminal() as stream:
        decode_tps(engine, stream, moves=True, tokens=200)
        for turn in range(arguments.rounds):
            for moves in (True, False) if turn % 2 else (False, True):
                rates[moves].append(decode_tps(engine, stream, moves=moves, tokens=arguments.tokens))
    shares = [1 - on / off for on, off in zip(rates[True], rates[False], strict=True)]
    measured = {
        "model": engine.facts.model_id,
        "kv_budget": engine.facts.plan.kv_budget,
        "tokens": arguments.tokens,
        "decode_tps_with": [round(rate, 1) for rate in rates[True]],
        "decode_tps_without": [round(rate, 1) for rate in rates[False]],
        "median_with": round(median(rates[True]), 1),
        "median_without": round(median(rates[False]), 1),
        "median_cost": round(median(shares), 4),
    }
    write_record("trimkv_cli.bench.toolbar", measured, arguments.out)


if __name__ == "__main__":
    main()
