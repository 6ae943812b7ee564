"""Speed and peak memory, beside another engine in turns, with all that a record of them needs."""

from __future__ import annotations

import gc
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol

import torch
import transformers
from torch import Tensor

import trimkv_cli
from trimkv_cli.bench.shapes import Network
from trimkv_cli.engine.devices import cuda_capability, reset_peak, wait_for
from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.facts import EngineFacts
from trimkv_cli.engine.scheduler import Decode
from trimkv_cli.loading.assemble import assemble
from trimkv_cli.model.machine import Machine
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
CHUNK = 512  # prompt tokens per forward of torch

EngineName = Literal["trimkv", "hf", "llama.cpp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one row of the result is about."""

    context: int
    rows: int
    kv_budget: int

    @property
    def answer_tokens(self) -> int:
        """The most tokens that a row answers: the first rows already decode while the last are still read."""
        return self.rows * -(-self.context // CHUNK) + MEASURED_TOKENS

    @property
    def keeps_all(self) -> bool:
        """Whether there is a slot for every token, so that none is evicted."""
        return self.kv_budget >= self.context + self.answer_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedRow:
    """One measurement; `kv_budget` is None where the cache is full, the bytes where none are known of this engine."""

    engine: EngineName
    context: int
    rows: int
    kv_budget: int | None
    keeps_all: bool
    prefill_tps: float
    decode_tps: float
    ms_per_token_p50: float
    ms_per_token_p95: float
    ttft_s: float
    steps: int
    predicted_bytes: int | None
    peak_bytes: int | None
    eviction: bool
    no_graph: str | None = None  # why a GPU decoded without a graph


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedOptions:
    """How to measure; prompts are cut from `text`, token ids of any number, or random where there is none.

    With `warm_up` each case begins with prompts that do not count: what is compiled, loaded or captured when it is
    first needed, as on a GPU, belongs to no measurement.
    """

    eviction: bool = True
    repeats: int = 1
    text: Sequence[int] = ()
    warm_up: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The times of one pass; `step_s` are steps in which every row gets a token."""

    prefill_s: float
    ttft_s: float
    step_s: list[float]
    peak_bytes: int | None = None
    no_graph: str | None = None


class Peer(Protocol):
    """Another engine with a full cache, which is given the same prompts."""

    @property
    def name(self) -> EngineName: ...

    def run(self, prompts: Tensor) -> Timing:
        """Read `prompts` [rows, context] and answer them greedily."""
        ...

    def predict(self, run: Run, case: Case) -> int | None:
        """Count what it is expected to take, given the run of trimkv; None where that cannot be said."""
        ...

    def about(self) -> dict[str, Any]:
        """Say which release it is and how it is set."""
        ...


def predict(network: Network, case: Case) -> Run:
    """Return what a case is expected to take, every byte of it."""
    return _plan(network, case).run


def _plan(network: Network, case: Case) -> Plan:
    device, machine = network.model.device, replace(Machine.here(), threads=torch.get_num_threads())
    if device.type == "cuda":
        machine = replace(machine, cuda_capability=cuda_capability(device))
    options = PlanOptions(
        kv_budget=case.kv_budget,
        max_inflight=case.rows,
        prefill_chunk=min(CHUNK, case.context),
        dtype=network.dtype,
        quantize=network.quantize,
        device=device.type,
        machine=machine,
    )
    return make_plan(network.spec, network.gate, options)


def about_network(network: Network, case: Case) -> dict[str, Any]:
    """Say what is measured, and what its weights take in memory."""
    run = predict(network, case)
    return {
        "shape": network.name,
        "dtype": network.dtype,
        "quantize": network.quantize,
        "bits_per_weight": run.bits_per_weight,
        "device": network.device_name,
    }


def measure(
    network: Network, cases: Sequence[Case], options: SpeedOptions, peer: Peer | None = None
) -> Iterator[SpeedRow]:
    """Measure each case, and the same contexts and rows with the peer, `repeats` times in turn.

    The medians are taken over all steps of all repetitions.
    """
    for case in cases:
        first = next(c for c in cases if (c.context, c.rows) == (case.context, case.rows))
        beside = peer if case == first else None
        prompts = make_prompts(network, case, options.text)
        own: list[Timing] = []
        other: list[Timing] = []
        for _ in range(options.repeats):
            own.append(run_own(network, case, options, prompts))
            other += [] if beside is None else [beside.run(prompts)]
        run = predict(network, case)
        yield _row(
            "trimkv",
            case,
            own,
            kv_budget=case.kv_budget,
            keeps_all=case.keeps_all,
            predicted_bytes=run.total_bytes,
            eviction=options.eviction,
        )
        if beside is not None:
            yield _row(
                beside.name,
                case,
                other,
                kv_budget=None,
                keeps_all=True,
                predicted_bytes=beside.predict(run, case),
                eviction=False,
            )


def _row(engine: EngineName, case: Case, timings: Sequence[Timing], **known: Any) -> SpeedRow:
    steps = sorted(seconds for timing in timings for seconds in timing.step_s)
    p50 = median(steps)
    peaks = [timing.peak_bytes for timing in timings if timing.peak_bytes is not None]
    return SpeedRow(
        engine=engine,
        context=case.context,
        rows=case.rows,
        prefill_tps=case.rows * case.context / median(timing.prefill_s for timing in timings),
        decode_tps=case.rows / p50,
        ms_per_token_p50=p50 * 1e3,
        ms_per_token_p95=steps[int(len(steps) * 0.95)] * 1e3,
        ttft_s=median(timing.ttft_s for timing in timings),
        steps=len(steps),
        peak_bytes=max(peaks, default=None),
        no_graph=next((timing.no_graph for timing in timings if timing.no_graph), None),
        **known,
    )


def measured_steps(seconds: Sequence[float]) -> list[float]:
    """Leave out the steps that warm up, and those beyond what is measured."""
    return list(seconds[_WARM_UP : _WARM_UP + _STEPS])


def make_prompts(network: Network, case: Case, text: Sequence[int] = ()) -> Tensor:
    """Return token ids [rows, context], the same on every call: random ones, or `text` cut and repeated."""
    if text:
        repeats = -(-case.rows * case.context // len(text))
        return torch.tensor(list(text) * repeats)[: case.rows * case.context].view(case.rows, case.context)
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


def run_own(network: Network, case: Case, options: SpeedOptions, prompts: Tensor) -> Timing:
    """Measure trimkv once, with an engine of its own; nothing of one before it counts for the peak."""
    gc.collect()  # engines are circles, and hold their caches
    reset_peak(network.model.device)
    engine = make_engine(network, case, options)
    try:
        if options.warm_up:
            _answer(engine, prompts[:, : case.kv_budget + 2 * CHUNK], _WARM_UP)
        return _time(engine, case, prompts)
    finally:
        engine.close()


def _answer(engine: Engine, prompts: Tensor, count: int) -> None:
    """Answer each prompt with so many tokens, to the end."""
    _add(engine, prompts, count)
    while engine.has_work:
        engine.step()


def _add(engine: Engine, prompts: Tensor, count: int) -> None:
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    for row, ids in enumerate(prompts.tolist()):
        engine.add(Request(id=str(row), prompt_token_ids=tuple(ids), params=params))


def _time(engine: Engine, case: Case, prompts: Tensor) -> Timing:
    _add(engine, prompts, case.answer_tokens)
    first: float | None = None
    begun: set[str] = set()
    started = time.perf_counter()
    with _decodes(engine) as decodes:
        while len(begun) < case.rows:
            begun |= {event.request_id for event in engine.step()}
            read_s = time.perf_counter() - started - sum(decodes)  # the first tokens are on the host: all is read
            first = read_s if first is None and begun else first
    seconds = measured_steps([_timed(engine.step) for _ in range(_WARM_UP + _STEPS)])
    for row in range(case.rows):
        engine.abort(str(row))
    return Timing(
        prefill_s=read_s,
        ttft_s=first or 0.0,
        step_s=seconds,
        peak_bytes=row_peak_bytes(engine._runner.device),
        no_graph=engine._runner.no_graph,
    )


@contextmanager
def _decodes(engine: Engine) -> Iterator[list[float]]:
    """Collect the seconds of decodes apart from those of prefills, which a GPU still computes when they begin."""
    runner = engine._runner
    run, seconds = runner.run, list[float]()

    def timed(batch: Any) -> Any:
        if not isinstance(batch, Decode):
            return run(batch)
        wait_for(runner.device)
        started = time.perf_counter()
        try:
            return run(batch)
        finally:
            wait_for(runner.device)
            seconds.append(time.perf_counter() - started)

    runner.run = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        runner.run = run  # type: ignore[method-assign]


def _timed(step: Callable[[], Any]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def row_peak_bytes(device: torch.device) -> int | None:
    """Return the peak since its reset, of the allocator on a GPU, else of the process; None where none can be read."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text(encoding="ascii")) if _CLEAR.exists() else None
    return None if found is None else int(found[1]) * 1024
