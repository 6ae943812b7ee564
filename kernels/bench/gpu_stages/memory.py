"""Stage 6: a budget beside what allocator and driver count, running out of memory, and what a context takes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.gpu_stages.engine import closing, prompt, tiny_engine
from bench.gpu_stages.stage import Check, Evidence, Facts, Setting, not_shown
from bench.memory import MODELS, PLANNED, requests, save_model
from helpers.engines import Shape, greedy
from trimkv_cli.engine.devices import cap_allocator, device_bytes, reset_peak
from trimkv_cli.engine.engine import Engine
from trimkv_cli.loading.checkup import measure_machine
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.model.machine import Machine

GIB = 2**30
BUDGETS = (("bf16", "none", 10 * GIB), ("bf16", "int8", 4 * GIB), ("bf16", "nf4", 4 * GIB))
_FAILING = (1, 3, 9)  # which forward runs out of memory
_CAPS = (0.75, 0.5, 0.25)  # of what a run took beyond what stays
_SMALL = Shape(kv_budget=16, gate="random", rows=3, prefill_chunk=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is asked of a model of which size."""

    model: str
    requests: int
    prompt: int


def sizes(setting: Setting) -> Sizes:
    """Return those of a rehearsal, or of a GPU."""
    if setting.tiny:
        return Sizes(model="qwen3, tiny", requests=4, prompt=100)
    return Sizes(model="qwen3, 88M", requests=12, prompt=3000)


def obstacle(quantize: str) -> str | None:
    """Say why weights cannot be held in this form here."""
    if quantize == "none":
        return None
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # noqa: BLE001  its libraries fail in many ways
        return f"bitsandbytes cannot be imported: {error}".splitlines()[0][:200]
    return None


def folder(setting: Setting) -> Path:
    """Make the folder of a random model with gates, once in a process."""
    place = setting.scratch / "model"
    return place if place.exists() else save_model(MODELS[sizes(setting).model], place)


def load(setting: Setting, dtype: str, quantize: str, budget: int) -> Engine:
    """Load the random model."""
    options = EngineOptions(
        model=str(folder(setting)), offline=True, device=str(setting.device), dtype=dtype, quantize=quantize,
        budget=str(budget), max_inflight=8, kv_budget="16" if setting.tiny else None, threads=1,
    )  # fmt: skip
    return load_engine(options)


def budgets(setting: Setting) -> Iterator[Evidence]:
    """Load and run under a budget in each precision; compare all that is counted with the plan, part by part."""
    for dtype, quantize, budget in BUDGETS:
        check = f"budget {dtype} {quantize}"
        why = obstacle(quantize)
        if why is not None:
            yield not_shown(check, why)
            continue
        with closing(load(setting, dtype, quantize, budget)) as engine:
            yield Evidence(check=check, **_held(engine, setting, budget))
        _empty(setting)


def _held(engine: Engine, setting: Setting, budget: int) -> dict[str, Any]:
    reset_peak(setting.device)
    asked = sizes(setting)
    ends = [event.finish_reason for event in engine.generate(requests(asked.requests, asked.prompt))]
    run, peaks = engine.facts.plan.run, engine.measured_peaks()
    planned = sum(run.part_bytes(name) for name in PLANNED)
    bounds = {
        "allocator_bytes": planned + run.part_bytes("graphs"),
        "reserved_bytes": budget - run.part_bytes("runtime"),
        "nvml_bytes": budget,
    }
    broken = [name for name, bound in bounds.items() if name in peaks and peaks[name] > bound]
    if not setting.on_gpu:
        broken += ["rss_bytes"] if peaks["rss_bytes"] > budget else []
    facts: Facts = {"budget": budget, "planned": planned, "broken": broken, "answered": ends.count("length")}
    facts |= {**peaks, "bounds": bounds, "weight_bytes": engine.facts.weight_bytes}
    facts |= {"parts": {part.name: part.bytes for part in run.parts if part.bytes}, "no_graph": engine._runner.no_graph}
    return {"ok": not broken and facts["answered"] == asked.requests, "facts": facts}


def _empty(setting: Setting) -> None:
    """Let go of all that an engine held, and of the cap on it."""
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()
        cap_allocator(setting.device, device_bytes(setting.device))


def injected(setting: Setting) -> Iterator[Evidence]:
    """Let one forward run out of memory after it was done, in prefills and in decodes: no token changes."""
    with closing(tiny_engine(setting.device, "ahead", _SMALL, "qwen3")) as engine:
        want = _answers(engine)
    for kind in ("prefill", "decode"):
        for at in _FAILING:
            with closing(tiny_engine(setting.device, "ahead", _SMALL, "qwen3")) as engine:
                failing = _fail(engine, kind, at)
                got = _answers(engine)
            facts = {"same": got == want, "failed": failing.failed}
            yield Evidence(check=f"out of memory in {kind} {at}", ok=got == want and failing.failed, facts=facts)


def _fail(engine: Engine, kind: str, at: int) -> Failing:
    """Let a forward of this engine fail; graphs of decodes are replayed behind what is wrapped here."""
    runner: Any = engine._runner
    if kind == "prefill":
        failing = runner._forward = Failing(runner._forward, at)
    else:
        rows = runner._ahead._device
        failing = rows.feed = Failing(rows.feed, at)
    return failing


class Failing:
    """Call something, and raise once when it has been called so many times."""

    def __init__(self, call: Callable[..., Any], at: int) -> None:
        self.call = call
        self.failed = False
        self._left = at

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        made = self.call(*arguments, **settings)
        self._left -= 1
        if self._left == 0:
            self.failed = True
            raise torch.OutOfMemoryError("injected: out of memory")
        return made


def _answers(engine: Engine) -> dict[str, Any]:
    """Answer more requests than there are rows; return tokens and ends."""
    answers: dict[str, Any] = {}
    for event in engine.generate(greedy(str(n), prompt(n, 20 + 9 * n), 6 + n) for n in range(5)):
        answers.setdefault(event.request_id, []).extend([*event.token_ids, *filter(None, [event.finish_reason])])
    return answers


def starved(setting: Setting) -> Iterator[Evidence]:
    """Allow less than a run takes: what does not fit ends, the others finish, and afterwards all do."""
    if not setting.on_gpu:
        for part in _CAPS:
            yield not_shown(f"{part:.0%} of the workspace", "a CPU's allocator has no cap")
        return
    asked = sizes(setting)
    for part in _CAPS:
        with closing(load(setting, "bf16", "none", BUDGETS[0][2])) as engine:
            reset_peak(setting.device)
            list(engine.generate(requests(asked.requests, asked.prompt)))
            comes = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            torch.cuda.empty_cache()
            stays = torch.cuda.memory_reserved()  # with graphs, and what cuBLAS keeps
            cap_allocator(setting.device, stays + int(part * comes))
            short, codes = _ends(engine, asked)
            cap_allocator(setting.device, device_bytes(setting.device))
            after, _ = _ends(engine, asked)
        _empty(setting)
        failed = len(codes)
        ok = short + failed == after == asked.requests and set(codes) <= {"out_of_memory"}
        facts = {"finished": short, "failed": failed, "codes": sorted(set(codes)), "afterwards": after}
        facts |= {"stays": stays, "comes": comes}
        yield Evidence(check=f"{part:.0%} of the workspace", ok=ok and short > 0, facts=facts)


def _ends(engine: Engine, asked: Sizes) -> tuple[int, list[str]]:
    """Return how many requests were answered to the end, and why others were not."""
    events = [event for event in engine.generate(requests(asked.requests, asked.prompt)) if event.finish_reason]
    codes = [str(event.error_code) for event in events if event.finish_reason == "error"]
    return len(events) - len(codes), codes


def context(setting: Setting) -> Iterator[Evidence]:
    """Measure what a process takes of a GPU beside its tensors, and compare it with what a plan takes for granted."""
    if not setting.on_gpu:
        yield not_shown("context", "a CPU has none")
        return
    planned, measured = Machine().runtime_bytes("cuda"), measure_machine().cuda_context_bytes
    if measured is None:
        yield not_shown("context", "the driver does not say what a process holds, and others change what is free")
        return
    facts = {"measured_bytes": measured, "planned_bytes": planned}
    yield Evidence(check="context", ok=0 < measured <= planned, facts=facts)


CHECKS: tuple[Check, ...] = (budgets, injected, starved, context)
