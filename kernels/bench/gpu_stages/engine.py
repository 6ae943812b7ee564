"""Stage 2: engines around tiny models in fp32, token for token beside the authors' runs, transformers and the CPU."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.gpu_stages.stage import Check, Evidence, Setting
from helpers.engines import Shape, as_on_a_gpu, greedy, make_engine, run
from helpers.tiny_models import make_model
from trimkv_cli.engine.cuda import Decoder
from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.row_files import read_row, write_row
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import Request, SamplingParams

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
CPU = torch.device("cpu")
Scenario = Callable[[Engine, Path], dict[str, Any]]  # plays on an engine, may use a folder; returns what must be equal
Way = str  # "in step", or "ahead": one step ahead of the host, on a GPU from graphs
WAYS: tuple[Way, ...] = ("in step", "ahead")


def golden(setting: Setting) -> Iterator[Evidence]:
    """Repeat the authors' own runs: tokens, kept positions, and log_beta where it is traced, which runs in step."""
    cases: list[dict[str, Any]] = json.loads((GOLDEN / "qwen3_rg_cases.json").read_text())
    stored = np.load(GOLDEN / "qwen3_rg_cases.npz")
    for case in cases[1::3] if setting.tiny else cases:
        data = {name.partition("/")[2]: stored[name] for name in stored.files if name.startswith(f"{case['case']}/")}
        options = EngineOptions(
            model=str(GOLDEN / "qwen3_base"), gates=str(GOLDEN / "qwen3_rg"), prefill_chunk=0, max_inflight=1,
            kv_budget=str(case["memory_size"]), device=str(setting.device), dtype="fp32", threads=1, offline=True,
        )  # fmt: skip
        with closing(load_engine(options)) as engine:
            if not setting.on_gpu:
                engine._runner.run_ahead(())
            for steps in (0, 16, 48):
                yield from _golden_run(engine, case["case"], data, steps, traced=False)
            yield from _golden_run(engine, case["case"], data, 48, traced=True)


def _golden_run(engine: Engine, case: str, data: dict[str, Any], steps: int, *, traced: bool) -> Iterator[Evidence]:
    if traced:
        engine.start_trace()
    params = SamplingParams(max_tokens=steps + 1, temperature=0.0, ignore_eos=True)
    prompt = tuple(data["input_ids"].tolist())
    tokens = run(engine, [Request(id="golden", prompt_token_ids=prompt, params=params, keep=True)])["golden"]
    want = data["greedy_ids"].tolist()[: steps + 1]
    kept = bool(np.array_equal(np.array(engine.kept.positions("golden")), data[f"kept_{steps}"]))
    facts: dict[str, Any] = {"tokens_equal": tokens[: len(want)] == want, "kept_equal": kept, "tokens": len(want)}
    if traced:
        log_beta = np.array(engine.traced_log_beta())
        error = np.abs(log_beta - data["log_beta"][..., : log_beta.shape[-1]]).max()
        facts["log_beta_error"] = float(error)
    engine.kept.release("golden")
    ok = facts["tokens_equal"] and kept and facts.get("log_beta_error", 0.0) < 1e-3
    yield Evidence(check=f"golden {case}, {steps} steps, {WAYS[not traced]}", ok=ok, facts=facts)


def full_budget(setting: Setting) -> Iterator[Evidence]:
    """Give as many slots as tokens: the tokens are those of transformers' `generate` on the same device."""
    for family in ("qwen3", "gemma3") if setting.tiny else ("qwen3", "qwen2", "llama", "mistral", "phi3", "gemma3"):
        plain = make_model(family).to(setting.device)
        prompts = [prompt(n, length) for n, length in enumerate((37, 5, 60))]
        want = [_generate(plain, prompt, 16) for prompt in prompts]
        for way in WAYS:
            with closing(tiny_engine(setting.device, way, Shape(rows=3, prefill_chunk=16), family)) as engine:
                fused = isinstance(engine._runner._decoder, Decoder)
                got = run(engine, [greedy(str(n), prompt, 16) for n, prompt in enumerate(prompts)])
            equal = sum(got[str(n)] == ids for n, ids in enumerate(want))
            facts = {"equal": equal, "of": len(want), "fused": fused}
            yield Evidence(check=f"full budget {family}, {way}", ok=fused and equal == len(want), facts=facts)


def _generate(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    tokens: list[int] = made[0, len(prompt) :].tolist()
    return tokens


def play(scenario: Scenario, shape: Shape) -> Check:
    """Return a check that plays a scenario here, in step and ahead, and on the CPU by the reference."""

    def check(setting: Setting) -> Iterator[Evidence]:
        for family in ("qwen3",) if setting.tiny else ("qwen3", "gemma3"):
            with closing(make_engine(make_model(family), shape, fast_path=False)) as reference:
                want = scenario(reference, setting.scratch)
            for way in WAYS:
                with closing(tiny_engine(setting.device, way, shape, family)) as engine:
                    got, graphs = scenario(engine, setting.scratch), _graphs(engine)
                differs = [name for name in want if got[name] != want[name]]
                # On a GPU each step ahead is a graph; those of other sizes of the cache are gone.
                captured = bool(graphs) == (setting.on_gpu and way == "ahead")
                name = (scenario.__doc__ or "").partition(":")[0]
                yield Evidence(
                    check=f"{name}, {family}, {way}",
                    ok=not differs and captured,
                    facts={"differs": differs, "graphs": graphs},
                )

    check.__name__ = scenario.__name__
    return check


@contextmanager
def closing(engine: Engine) -> Iterator[Engine]:
    """Close an engine, and free its graphs and cache before the next one captures."""
    try:
        yield engine
    finally:
        engine.close()
        del engine
        gc.collect()


def tiny_engine(device: torch.device, way: Way, shape: Shape, family: str) -> Engine:
    """Return an engine around a tiny model that decodes as on a GPU, there as `assemble` chooses."""
    with as_on_a_gpu() if device.type == "cpu" else nullcontext():
        engine = make_engine(make_model(family).to(device), shape)
    if way == "in step":
        engine._runner._ahead = None
    elif device.type == "cpu":
        engine._runner.run_ahead(shape.eos)
    return engine


def _graphs(engine: Engine) -> list[int]:
    """Return the numbers of rows for which a graph was captured."""
    return sorted(key for key in engine._runner._graphs or () if isinstance(key, int))


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(3 + (7 * n + 13 * seed) % 120 for n in range(length))


def _steps(engine: Engine, tokens: dict[str, list[int]], until: Callable[[], bool]) -> dict[str, list[int]]:
    """Step until something holds or nothing is left; collect tokens by request."""
    while engine.has_work and not until():
        for event in engine.step():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
    return tokens


def _never() -> bool:
    return False


def _mixed(engine: Engine, _: Path) -> dict[str, Any]:
    """more requests than rows: greedy and seeded, of different lengths, one with log probabilities, some that end."""
    requests = []
    for n in range(8):
        more: dict[str, Any] = {"temperature": 0.0} if n % 2 else {"temperature": 1.5, "seed": n}
        more |= {"logprobs": 1} if n == 5 else {}
        params = SamplingParams(max_tokens=1 + 5 * n, ignore_eos=n == 6, **more)
        requests.append(Request(id=str(n), prompt_token_ids=prompt(n, 17 + 2 * n), params=params))
    return {"tokens": run(engine, requests)}


def _growing(engine: Engine, _: Path) -> dict[str, Any]:
    """rows from 1 to 8: every few tokens one more decodes, so that graphs of 1, 2, 4 and 8 rows follow each other."""
    tokens: dict[str, list[int]] = {}
    for n in range(8):
        engine.add(greedy(str(n), prompt(n, 20 + n), 40, keep=True))
        _steps(engine, tokens, lambda n=n: len(tokens.get(str(n), ())) >= 3)
    _steps(engine, tokens, _never)
    return {"tokens": tokens, "kept": [engine.kept.positions(str(n)) for n in range(8)]}


def _resize(engine: Engine, _: Path) -> dict[str, Any]:
    """a resize on the way: fewer slots, then more, while two rows decode that have begun together."""
    tokens: dict[str, list[int]] = {}
    for n in range(2):
        engine.add(greedy(str(n), prompt(n, 30), 30, keep=True))
    evicted = []
    for count, slots in ((8, 9), (16, 21)):
        _steps(engine, tokens, lambda count=count: all(len(tokens.get(str(n), ())) >= count for n in range(2)))
        evicted.append(engine.resize(slots).evicted)
    _steps(engine, tokens, _never)
    return {"tokens": tokens, "evicted": evicted, "kept": [engine.kept.positions(str(n)) for n in range(2)]}


def _stop(engine: Engine, _: Path) -> dict[str, Any]:
    """a stop: what was fed ahead is taken back, and a next turn goes on from there."""
    tokens: dict[str, list[int]] = {}
    engine.add(greedy("a", prompt(1, 40), 30, keep=True))
    engine.add(greedy("b", prompt(2, 30), 12))
    _steps(engine, tokens, lambda: len(tokens.get("a", ())) >= 6)
    engine.stop("a")
    at_stop = {"seen": engine.kept.seen("a"), "kept": engine.kept.positions("a")}
    _steps(engine, tokens, _never)
    after = run(engine, [greedy("c", (5, 6, 7), 9, continues="a")])
    return {**at_stop, "a": tokens["a"][:6], "b": tokens["b"], "after": after}


def _save(engine: Engine, folder: Path) -> dict[str, Any]:
    """a row in a file: saved, read into another row, gone on with twice alike."""
    run(engine, [greedy("a", prompt(3, 50), 8, keep=True)])
    state, path = engine.kept.save("a"), folder / "row.kv"
    write_row(path, state, model_id="tiny", fingerprint=engine.fingerprint)
    turn = (state.last_token or 0, 9, 8)
    first = run(engine, [greedy("b", turn, 9, continues="a", keep=True)])["b"]
    kept = engine.kept.positions("b")
    engine.kept.release("b")
    engine.kept.restore(read_row(path, model_id="tiny", fingerprint=engine.fingerprint), "a")
    path.unlink()
    again = run(engine, [greedy("b", turn, 9, continues="a", keep=True)])["b"]
    same = again == first and engine.kept.positions("b") == kept
    return {"tokens": first, "kept": kept, "twice alike": same or again}


def _prefix(engine: Engine, _: Path) -> dict[str, Any]:
    """a shared prefix: read once for all that have it."""
    shared = prompt(5, 48)
    requests = [greedy(str(n), (*shared, *prompt(n, 6)), 12, prefix_len=len(shared)) for n in range(4)]
    tokens = run(engine, requests)
    assert engine.stats.shared_prefix_tokens == len(shared) * 3
    return {"tokens": tokens}


_SMALL = Shape(kv_budget=16, gate="random", rows=3, prefill_chunk=16, eos=frozenset({7, 11, 40}))
SCENARIOS: dict[Scenario, Shape] = {
    _mixed: _SMALL,
    _growing: Shape(kv_budget=16, gate="random", rows=8, prefill_chunk=16),
    _resize: Shape(kv_budget=16, gate="random", rows=2, prefill_chunk=64),
    _stop: Shape(kv_budget=16, gate="random", rows=3, prefill_chunk=16),
    _save: Shape(kv_budget=16, gate="random", rows=2, prefill_chunk=16),
    _prefix: Shape(kv_budget=16, gate="random", rows=4, prefill_chunk=16),
}

CHECKS: tuple[Check, ...] = (golden, full_budget, *(play(scenario, shape) for scenario, shape in SCENARIOS.items()))
