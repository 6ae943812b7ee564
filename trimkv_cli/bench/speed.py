"""Speed and peak memory, beside transformers' own generate, with all that a record of them needs."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import StoppingCriteria
from transformers.cache_utils import DynamicCache

import trimkv_cli
from trimkv_cli.bench.shapes import Network
from trimkv_cli.cache.releases import cache_argument, forward_logits
from trimkv_cli.engine.devices import reset_peak
from trimkv_cli.engine.engine import Engine, EngineFacts
from trimkv_cli.loading.assemble import assemble
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.plan.plan import Plan, make_plan
from trimkv_cli.plan.run import Run
from trimkv_cli.request import Request, SamplingParams


def surroundings(module: str) -> dict[str, Any]:
    """Say with what `module` measures here and now."""
    return {
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "commit": own_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def own_commit(folder: Path | None = None) -> str:
    """Name the commit of trimkv's own code, which lies in `folder`; "version X" where that is in no repository.

    It may lie inside another project's repository, in its virtual environment: then git does not know its files.
    """
    folder = folder or Path(__file__).parents[1]
    known = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    commit = None if known is None else _git(folder, "rev-parse", "HEAD")
    return commit or f"version {trimkv_cli.__version__}"


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints about a folder; None when it fails or is not there."""
    around = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, env=around, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


_STEPS = 64
_WARM_UP = 8
MEASURED_TOKENS = _WARM_UP + _STEPS + 1
_CHUNK = 512  # prompt tokens per forward, on both sides


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one row of the result is about."""

    context: int
    rows: int
    kv_budget: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRow:
    """One measurement; `kv_budget` is None where nothing is evicted, `peak_bytes` None where no peak can be read."""

    engine: Literal["trimkv", "hf"]
    context: int
    rows: int
    kv_budget: int | None
    prefill_tps: float
    decode_tps: float
    ms_per_token_p50: float
    ms_per_token_p95: float
    ttft_s: float
    steps: int
    predicted_bytes: int
    peak_bytes: int | None
    eviction: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedOptions:
    """How to measure; `compare` adds transformers' own generate."""

    compare: bool = False
    eviction: bool = True
    repeats: int = 1


def predict(network: Network, case: Case) -> Run:
    """Return what a case is expected to take, every byte of it."""
    return _plan(network, case).run


def _plan(network: Network, case: Case) -> Plan:
    options = PlanOptions(
        kv_budget=case.kv_budget,
        max_inflight=case.rows,
        prefill_chunk=min(_CHUNK, case.context),
        dtype=network.dtype,
        device=network.model.device.type,
    )
    return make_plan(network.spec, network.gate, options)


def measure(network: Network, cases: Sequence[Case], options: SpeedOptions) -> Iterator[SpeedRow]:
    """Measure each case, and the same contexts and rows with transformers, `repeats` times in turn.

    The medians are taken over all steps of all repetitions.
    """
    for case in cases:
        plain = options.compare and case == next(c for c in cases if (c.context, c.rows) == (case.context, case.rows))
        own: list[_Run] = []
        full: list[_Run] = []
        for _ in range(options.repeats):
            own.append(_run_own(network, case, options))
            full += [_run_plain(network, case)] if plain else []
        run = predict(network, case)
        yield _row("trimkv", case, own, run.total_bytes, options)
        if full:
            yield _row(
                "hf",
                case,
                full,
                run.part_bytes("weights") + case.rows * run.full_cache_bytes(case.context),
                options,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    prefill_s: float
    ttft_s: float
    step_s: list[float]
    peak_bytes: int | None


def _row(
    engine: Literal["trimkv", "hf"], case: Case, runs: list[_Run], predicted: int, options: SpeedOptions
) -> SpeedRow:
    steps = sorted(seconds for run in runs for seconds in run.step_s)
    p50 = median(steps)
    own = engine == "trimkv"
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return SpeedRow(
        engine=engine,
        context=case.context,
        rows=case.rows,
        kv_budget=case.kv_budget if own else None,
        prefill_tps=case.rows * case.context / median(run.prefill_s for run in runs),
        decode_tps=case.rows / p50,
        ms_per_token_p50=p50 * 1e3,
        ms_per_token_p95=steps[int(len(steps) * 0.95)] * 1e3,
        ttft_s=median(run.ttft_s for run in runs),
        steps=len(steps),
        predicted_bytes=predicted,
        peak_bytes=max(peaks, default=None),
        eviction=own and options.eviction,
    )


def _prompts(network: Network, case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(case.context)
    return torch.randint(network.spec.vocab_size, (case.rows, case.context), generator=generator)


def make_engine(network: Network, case: Case, options: SpeedOptions) -> Engine:
    facts = EngineFacts.of(network.model, network.gates, plan=_plan(network, case), model_id=network.name)
    dtype = network.model.dtype
    return assemble(
        network.model,
        network.gates,
        facts,
        text=None,
        kv_dtype=dtype,
        evicts=options.eviction,
    )


def _run_own(network: Network, case: Case, options: SpeedOptions) -> _Run:
    reset_peak(network.model.device)
    engine = make_engine(network, case, options)
    ahead = case.rows * -(-case.context // _CHUNK)  # steps in which the first rows decode and the last still read
    params = SamplingParams(max_tokens=ahead + MEASURED_TOKENS, temperature=0.0, ignore_eos=True)
    for row, ids in enumerate(_prompts(network, case).tolist()):
        engine.add(Request(id=str(row), prompt_token_ids=tuple(ids), params=params))
    started = time.perf_counter()
    first: float | None = None
    begun: set[str] = set()
    while len(begun) < case.rows:
        begun |= {event.request_id for event in engine.step()}
        first = first or (time.perf_counter() - started if begun else None)
    prefill_s = engine.stats.prefill_s
    seconds = [_timed(engine.step) for _ in range(_WARM_UP + _STEPS)][_WARM_UP:]
    for row in range(case.rows):
        engine.abort(str(row))
    engine.close()
    return _Run(
        prefill_s=prefill_s, ttft_s=first or 0.0, step_s=seconds, peak_bytes=row_peak_bytes(network.model.device)
    )


def _timed(step: Callable[[], Any]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Note when each token of `generate` is there; never stops it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def _run_plain(network: Network, case: Case) -> _Run:
    """Read the prompt in chunks into a DynamicCache, and let transformers' generate go on from there."""
    model: Any = network.model
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    reset_peak(model.device)
    ids = _prompts(network, case).to(model.device)
    cache, clock = DynamicCache(config=model.config), _Clock()
    started = time.perf_counter()
    for chunk in torch.split(ids[:, :-1], _CHUNK, dim=1):
        forward_logits(model, chunk, cache)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=MEASURED_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[clock],
        **{cache_argument(model): cache},
    )
    times = clock.times
    seconds = [later - earlier for earlier, later in pairwise(times)][_WARM_UP:]
    first = times[0] - started
    return _Run(prefill_s=first, ttft_s=first, step_s=seconds, peak_bytes=row_peak_bytes(model.device))


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def row_peak_bytes(device: torch.device) -> int | None:
    """Return the peak since its reset, of the allocator on a GPU, else of the process; None where none can be read."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="ascii")) if _CLEAR.exists() else None
    return None if found is None else int(found[1]) * 1024
