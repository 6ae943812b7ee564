"""`trimkv bench --compare llama.cpp`, with a module that stands for the wheel."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Barrier
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from bench import against_llama
from helpers.gguf_files import write_gguf
from helpers.programs import Run
from trimkv_cli.bench import llama_cpp
from trimkv_cli.bench.llama_cpp import LlamaCpp, LlamaSettings
from trimkv_cli.bench.speed import MEASURED_TOKENS, SpeedRow
from trimkv_cli.errors import ModelError, TrimkvError
from trimkv_cli.ui.accuracy import speed_lines

Chunk = dict[str, Any]


class Server:
    """What xllamacpp.Server does with a request, without a model; `cached` tokens of a prompt are not read."""

    served: ClassVar[list[Server]] = []
    cached = 0

    def __init__(self, params: Any) -> None:
        if params.cache_type_v == "q8_0" and params.flash_attn_type == "disabled":
            raise RuntimeError("Failed to init server")
        self.params, self.asked, self.step = params, [], Barrier(params.n_parallel)
        Server.served.append(self)

    def handle_completions(self, asked: Chunk, callback: Callable[[Chunk], None]) -> None:
        self.asked.append(asked)
        [ids] = asked["prompt"]
        assert (asked["stream"], asked["timings_per_token"], asked["ignore_eos"]) == (True, True, True)
        assert (asked["cache_prompt"], asked["temperature"]) == (False, 0)
        if len(ids) + asked["n_predict"] > self.params.n_ctx // self.params.n_parallel:
            callback({"error": {"message": "exceeds the available context size"}})
            return
        timings = {"prompt_n": len(ids) - self.cached, "prompt_ms": 20.0}
        for n in range(1, asked["n_predict"] + 1):
            self.step.wait(timeout=10)  # a step gives every row a token
            callback({"timings": {**timings, "predicted_n": n}})
        callback({"timings": {**timings, "predicted_n": asked["n_predict"]}})


@pytest.fixture(autouse=True)
def wheel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand for xllamacpp, which CI does not install."""
    module: Any = ModuleType("xllamacpp")
    module.__version__, module.Server = "1.2.3", Server
    module.get_system_info = lambda: "CPU : AVX2 = 1 | "
    module.llama_flash_attn_type = SimpleNamespace(
        LLAMA_FLASH_ATTN_TYPE_AUTO="auto",
        LLAMA_FLASH_ATTN_TYPE_ENABLED="enabled",
        LLAMA_FLASH_ATTN_TYPE_DISABLED="disabled",
    )
    module.ggml_type = SimpleNamespace(GGML_TYPE_F16="f16", GGML_TYPE_Q8_0="q8_0")
    module.CommonParams = lambda: SimpleNamespace(
        model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace()
    )
    monkeypatch.setitem(sys.modules, "xllamacpp", module)
    monkeypatch.setattr(Server, "served", [])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, "llama", kind="Q4_1", max_position_embeddings=1024)
    return path


def test_both_sides_get_the_same_file_threads_and_prompts(here: Run, tiny: Path, monkeypatch: Any) -> None:
    """Catches a peer with other prompts or more threads, a cached prefix, and a log in what is printed."""
    given: list[Any] = []
    make = llama_cpp.LlamaCpp.run
    monkeypatch.setattr(LlamaCpp, "run", lambda self, prompts: given.append(prompts.tolist()) or make(self, prompts))
    budgets, rest = ("--kv-budget", "16,500"), ("--threads", "1", "--json", "--offline")
    done = here("bench", tiny, *budgets, "--contexts", "40", "--rows", "2", "--compare", "llama.cpp", *rest)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"nothing is evicted") == 1
    result = json.loads(done.stdout)
    found = [(row["engine"], row["kv_budget"], row["keeps_all"], row["steps"]) for row in result["rows"]]
    assert found == [("trimkv", 16, False, 64), ("llama.cpp", None, True, 64), ("trimkv", 500, True, 64)]
    assert (result["bits_per_weight"], result["threads"]) == (7.55, 1)  # packed
    assert result["peer"] == {
        "engine": "llama.cpp",
        "version": "xllamacpp 1.2.3",
        "compiled_for": "CPU : AVX2 = 1",
        "threads": 1,
        "flash_attention": "auto",
        "cache_k": "f16",
        "cache_v": "f16",
    }
    [server] = Server.served
    assert [sorted(asked["prompt"][0] for asked in server.asked)] == [sorted(prompts) for prompts in given]
    params = server.params
    assert (params.model.path, params.n_parallel, params.n_ctx % 512) == (str(tiny), 2, 0)
    assert (params.cpuparams.n_threads, params.cpuparams_batch.n_threads) == (1, 1)
    assert (params.n_gpu_layers, params.verbosity, params.flash_attn_type) == (0, -1, "auto")


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["mini"], b"reads a GGUF file, which .* is not", 2),
        (["--shape", "10m", "--random-weights"], b"reads a GGUF file, which random weights are not", 2),
    ],
)
def test_what_is_no_gguf_file_is_refused(here: Run, arguments: list[str], said: bytes, code: int) -> None:
    """Catches a comparison with nothing, found out after the weights were read."""
    done = here("bench", *arguments, "--compare", "llama.cpp", "--offline")
    assert done.returncode == code
    assert re.search(said, done.stderr), done.stderr


def test_a_missing_wheel_says_how_to_get_it(here: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    done = here("bench", tiny, "--compare", "llama.cpp", "--offline")
    assert done.returncode == 2
    assert b"needs xllamacpp" in done.stderr
    assert b"pip install 'trimkv-cli[compare]'" in done.stderr


def test_a_prompt_that_was_not_read_is_no_measurement(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a prefill that a cached prefix made fast."""
    monkeypatch.setattr(Server, "cached", 4)
    with pytest.raises(TrimkvError, match="read 36 of 40 prompt tokens"):
        LlamaCpp(file=tiny).run(torch.zeros(1, 40, dtype=torch.long))


def test_what_llama_cpp_refuses_is_said(tiny: Path) -> None:
    settings = LlamaSettings(flash_attention="off", cache_v="q8_0")
    with pytest.raises(ModelError, match=r"cannot load tiny\.gguf"):
        LlamaCpp(file=tiny, settings=settings).run(torch.zeros(1, 8, dtype=torch.long))


def test_tokens_that_arrive_together_share_their_time(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches steps that are counted by messages: half of a character holds its token back."""
    clock = iter([0.0, 1.0, 1.5, 3.5, 4.0])
    monkeypatch.setattr(llama_cpp, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    next(clock)

    def handle(asked: Chunk, callback: Callable[[Chunk], None]) -> None:
        for n in (1, 2, 4, 4):
            callback({"timings": {"prompt_n": 3, "prompt_ms": 9.0, "predicted_n": n}})

    answer = llama_cpp._answer(SimpleNamespace(handle_completions=handle), [5, 6, 7], 4)
    assert (answer.times, answer.prompt_s) == ([1.0, 1.5, 2.5, 3.5], 0.009)


def test_a_row_that_keeps_everything_says_so() -> None:
    """Catches a speed without eviction that is taken for one with it."""
    known: dict[str, Any] = {"context": 40, "rows": 1, "prefill_tps": 1.0, "decode_tps": 1.0, "ms_per_token_p50": 1.0}
    known |= {"ms_per_token_p95": 1.0, "ttft_s": 1.0, "steps": 64, "predicted_bytes": 1, "peak_bytes": None}
    rows = [SpeedRow(engine="trimkv", kv_budget=90, keeps_all=k, eviction=True, **known) for k in (True, False)]
    _, kept, evicting = speed_lines(rows)
    assert "90 (none evicted)" in kept
    assert "none evicted" not in evicting


def test_the_record_takes_the_best_settings(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a record without its pilot, without M ≥ length, or one that is only there in the end."""
    out = tmp_path / "record.json"
    kept: list[int] = []
    measure = against_llama.measure

    def watching(*arguments: Any) -> Iterator[SpeedRow]:
        kept.append(len(json.loads(out.read_text(encoding="utf-8"))["pilot"]))
        yield from measure(*arguments)

    monkeypatch.setattr(against_llama, "measure", watching)
    monkeypatch.setattr(sys, "argv", ["against_llama", str(tiny), "--quick", "--out", str(out)])
    against_llama.main()
    record = json.loads(out.read_text(encoding="utf-8"))
    assert kept == [4]
    speeds = [row["decode_tps"] for row in record["pilot"]]
    chosen = record["pilot"][speeds.index(max(speeds))]
    own, peer, keeping = record["rows"]
    assert [peer[name] for name in ("flash_attention", "cache_k")] == [chosen["flash_attention"], chosen["cache_k"]]
    assert [(row["kv_budget"], row["keeps_all"]) for row in (own, peer, keeping)] == [
        (256, False), (None, True), (512 + 1 + MEASURED_TOKENS, True)
    ]  # fmt: skip
    assert {"command", "commit", "cpu_flags", "load_average", "bits_per_weight", "peer", "repeats"} <= record.keys()


def test_settings_that_are_refused_are_not_the_best() -> None:
    tried = [{"decode_tps": speed} for speed in (None, 2.0, 3.0, None)]
    assert against_llama.best(tried) == against_llama.PILOT[2]
