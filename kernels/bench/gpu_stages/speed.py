"""Stage 4: a network of Qwen3-4B's size with random weights: tokens per second, and what a step's time goes to."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from statistics import median
from typing import Any

import torch

from bench.gpu_stages.env import copy_bandwidth
from bench.gpu_stages.stage import Check, Evidence, Facts, Setting, wanted
from bench.gpu_stages.timing import profiled
from trimkv_cli.bench.hf import Transformers
from trimkv_cli.bench.shapes import Network, find_shape, random_network
from trimkv_cli.bench.speed import (
    MEASURED_TOKENS,
    Case,
    Peer,
    SpeedOptions,
    SpeedRow,
    make_engine,
    make_prompts,
    measure,
    predict,
    run_own,
)
from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.sampler import Sampler
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import Request, SamplingParams

# arXiv 2512.03324, by context and rows: tokens per second on an H100 or H200, M = 1,024
PAPER_TPS = {(32_768, 4): 130.5, (16_384, 4): 151.0, (16_384, 8): 279.9}
_TIMES_PAPER, _SHARE, _EVICTION, _PREFILL_TPS = 10, 0.7, 0.01, 40_000
_SMALLER = 128  # so many times, for a rehearsal
_TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
_TURNS = 3
_OUTSIDE = ("runtime", "quantiser", "tokenizer", "slack")  # parts of a plan that no allocator of torch sees

ONE_ROW = (Case(context=2048, rows=1, kv_budget=512), Case(context=2048, rows=1, kv_budget=1024))
SEVERAL = (Case(context=16_384, rows=8, kv_budget=1024), Case(context=16_384, rows=4, kv_budget=1024))


@cache
def network(setting: Setting) -> Network:
    """Make the network once, on the device."""
    options = EngineOptions(device=str(setting.device), dtype="fp32" if setting.tiny else "bf16")
    shape = find_shape("10m" if setting.tiny else "qwen3-4b")
    return random_network(replace(shape, config={**shape.config, **_TINY}) if setting.tiny else shape, options)


@cache
def bandwidth(setting: Setting) -> float:
    """Measure the bandwidth of a copy once."""
    return copy_bandwidth(setting)


def sized(case: Case, setting: Setting) -> Case:
    """Return a case as it is, or much smaller."""
    if not setting.tiny:
        return case
    return Case(context=case.context // _SMALLER, rows=case.rows, kv_budget=case.kv_budget // _SMALLER)


def speeds(setting: Setting, case: Case, peer: Peer | None = None) -> Iterator[Evidence]:
    """Measure a case, and the same with a peer, after a warm-up."""
    small = sized(case, setting)
    for row in measure(network(setting), [small], SpeedOptions(warm_up=True), peer):
        facts: Facts = {"asked": asdict(case), **asdict(row)}
        sound = row.steps > 0 and row.no_graph is None
        what = f"{'' if row.engine == 'trimkv' else row.engine + ', '}{_name(case)}"
        if row.engine != "trimkv":
            yield Evidence(check=f"decode {what}", ok=sound, facts=facts)
            continue
        run = predict(network(setting), small)
        allowed = run.total_bytes - sum(run.part_bytes(part) for part in _OUTSIDE)
        facts["allowed_bytes"] = allowed
        sound = sound and (not setting.on_gpu or (row.peak_bytes or allowed + 1) <= allowed)
        yield Evidence(check=f"decode {what}", ok=sound, facts={**facts, **_decode_wanted(setting, case, row)})
        least = wanted(row.prefill_tps, least=_PREFILL_TPS) if case.kv_budget == 1024 else {}
        yield Evidence(check=f"prefill {what}", ok=sound, facts={"prefill_tps": row.prefill_tps, **least})


def _name(case: Case) -> str:
    return f"rows {case.rows} M {case.kv_budget} after {case.context:,}"


def _decode_wanted(setting: Setting, case: Case, row: SpeedRow) -> Facts:
    """Compare with the paper where it has the case, else one row's step with a copy of the bytes that it must read."""
    paper = PAPER_TPS.get((case.context, case.rows))
    if paper is not None:
        beside = wanted(row.decode_tps / paper, least=_TIMES_PAPER, form="× {:.1f} of the paper's")
        return {"paper_tps": paper, **beside}
    run = predict(network(setting), sized(case, setting))
    read = sum(run.part_bytes(part) for part in ("weights", "gates", "kv"))
    share = read / bandwidth(setting) / (row.ms_per_token_p50 / 1e3)
    return {"read_bytes": read, "share": share, **wanted(share, least=_SHARE, form="{:.0%} of the bandwidth limit")}


def of(case: Case, *, beside: bool = False) -> Check:
    """Return the check that measures a case, beside transformers where asked; one that breaks costs no other."""

    def check(setting: Setting) -> Iterator[Evidence]:
        yield from speeds(setting, case, Transformers(network=network(setting)) if beside else None)

    check.__name__ = _name(case)
    return check


def eviction(setting: Setting) -> Iterator[Evidence]:
    """Measure by turns with scoring and eviction and without."""
    made, case = network(setting), sized(ONE_ROW[0], setting)
    prompts = make_prompts(made, case)
    steps: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(1 if setting.tiny else _TURNS):
        for evicts in steps:
            steps[evicts] += run_own(made, case, SpeedOptions(eviction=evicts, warm_up=True), prompts).step_s
    on, off = (median(times) * 1e3 for times in steps.values())
    facts = {"with_ms": on, "without_ms": off, "steps": len(steps[True])}
    share = wanted(1 - off / on, most=_EVICTION, form="{:.1%} of a step")
    yield Evidence(check="scoring and eviction", ok=math.isfinite(on / off), facts={**facts, **share})


def profiles(setting: Setting) -> Iterator[Evidence]:
    """List the kernels of a step as an engine does it, on a GPU from a graph, and of the same one launched singly."""
    case = sized(ONE_ROW[1], setting)
    engine = make_engine(network(setting), case, SpeedOptions())
    try:
        _begin(engine, case, setting)
        step_us = _step_us(engine)
        graph = profiled(engine.step, setting)
        facts: Facts = {"step_us": step_us, "busy_share": graph.us / step_us, **graph.facts}
        ok = bool(graph.kernels) and engine._runner.no_graph is None
        yield Evidence(check="kernels of a step", ok=ok, facts=facts)
        ids = torch.zeros(1, dtype=torch.int64, device=setting.device)
        position = torch.full((1,), case.context + MEASURED_TOKENS, dtype=torch.int32, device=setting.device)
        with torch.inference_mode():
            eager = profiled(lambda: engine._runner._forward_static(ids, position, 1), setting)
        yield Evidence(check="kernels of a step launched singly", ok=bool(eager.kernels), facts=eager.facts)
    finally:
        engine.close()


def _begin(engine: Engine, case: Case, setting: Setting) -> None:
    """Bring an engine to where it decodes after the case's context, from a graph if any."""
    ids = tuple(make_prompts(network(setting), case)[0].tolist())
    params = SamplingParams(max_tokens=case.answer_tokens, temperature=0.0, ignore_eos=True)
    engine.add(Request(id="0", prompt_token_ids=ids, params=params))
    while not engine.step():
        pass
    for _ in range(4):
        engine.step()


def _step_us(engine: Engine) -> float:
    """Return the microseconds of a step, as the host sees them: each waits for the tokens of the one before."""
    times = []
    for _ in range(16):
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    return median(times) * 1e6


def samplers(setting: Setting) -> Iterator[Evidence]:
    """Profile what is captured of choosing tokens, greedily and from the likeliest, for one row and for many."""
    ways: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "top-p": {"temperature": 0.7, "top_p": 0.8}}
    size = network(setting).spec.vocab_size
    for rows in (1, 2 if setting.tiny else 64):
        logits = torch.randn(rows, size, device=setting.device)
        for name, how in ways.items():
            sampler = Sampler(rows, size, setting.device, None, None)
            for row in range(rows):
                sampler.set_row(row, SamplingParams(max_tokens=1, seed=row, **how), ())
            form, live = sampler.form(range(rows)), torch.ones(rows, dtype=torch.bool, device=setting.device)
            assert form is not None, "nothing here hangs on the host"
            choose = partial(sampler.choose, logits, form, live=live)
            with torch.inference_mode():
                tokens, profile = choose(), profiled(choose, setting)
            right = bool((tokens == logits.argmax(-1)).all()) if name == "greedy" else bool((tokens >= 0).all())
            yield Evidence(check=f"sampler {name} rows {rows}", ok=right and profile.count > 0, facts=profile.facts)


CHECKS: tuple[Check, ...] = (*map(of, (*ONE_ROW, *SEVERAL)), eviction, profiles, samplers)
