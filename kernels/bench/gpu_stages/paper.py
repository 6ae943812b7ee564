"""Stage 7: the paper's own measurements, contexts that cost nothing, and transformers beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from statistics import median

from bench.gpu_stages.speed import ONE_ROW, PAPER_TPS, network, of, sized
from bench.gpu_stages.stage import Check, Evidence, Facts, Setting, wanted
from trimkv_cli.bench.speed import Case, SpeedOptions, Timing, make_prompts, run_own

SHORT, LONG = ONE_ROW[0], Case(context=131_072, rows=1, kv_budget=ONE_ROW[0].kv_budget)
_GROWTH, _SLOWER = 1.01, 1.02  # of the peak, and of a step
_BESIDE = (2048, 16_384)  # contexts that transformers reads in seconds


def flat(setting: Setting) -> Iterator[Evidence]:
    """Compare a long context with a short one: the peak of memory is a bound, the time of a step a wish."""
    timings: list[Timing] = []
    for case in (SHORT, LONG):
        small, made = sized(case, setting), network(setting)
        timing = run_own(made, small, SpeedOptions(warm_up=True), make_prompts(made, small))
        facts: Facts = {"ms_per_token": median(timing.step_s) * 1e3, "prefill_s": timing.prefill_s}
        facts |= {"peak_bytes": timing.peak_bytes, "no_graph": timing.no_graph, **asdict(small)}
        yield Evidence(check=f"after {case.context:,}", ok=timing.no_graph is None, facts=facts)
        timings.append(timing)
    short, long = timings
    growth = (long.peak_bytes or 0) / (short.peak_bytes or 1)
    # The peak of a process on a CPU is anyone's, and was there before.
    beside = wanted(growth, most=_GROWTH, form="× {:.4f}")
    ok = growth > 0 and (not setting.on_gpu or growth <= _GROWTH)
    yield Evidence(check="peak memory, long over short", ok=ok, facts=beside)
    slower = median(long.step_s) / median(short.step_s)
    yield Evidence(
        check="time of a step, long over short", ok=True, facts=wanted(slower, most=_SLOWER, form="× {:.3f}")
    )


THE_PAPERS = tuple(Case(context=context, rows=rows, kv_budget=1024) for context, rows in PAPER_TPS)
BESIDE = tuple(Case(context=context, rows=1, kv_budget=SHORT.kv_budget) for context in _BESIDE)

CHECKS: tuple[Check, ...] = (*map(of, THE_PAPERS), flat, *(of(case, beside=True) for case in BESIDE))
