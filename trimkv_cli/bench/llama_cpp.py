"""llama.cpp as a peer: the same GGUF file and threads on a CPU, through the wheel `xllamacpp`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trimkv_cli.bench.speed import MEASURED_TOKENS, Case, EngineName, Timing, measured_steps
from trimkv_cli.engine.devices import take_device
from trimkv_cli.errors import ModelError, TrimkvError, UsageError
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import Source
from trimkv_cli.plan.run import Run

_LEAST_BATCH = 512  # prompt tokens that llama.cpp reads at a time at the least, while other rows decode
_CELLS = 256  # a sequence's cache is a multiple
_SILENT = -1

CacheType = Literal["f16", "q8_0"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaSettings:
    """What llama.cpp is told beyond threads and sizes; these are its own defaults.

    Values in q8_0 need flash attention.
    """

    flash_attention: Literal["auto", "on", "off"] = "auto"
    cache_k: CacheType = "f16"
    cache_v: CacheType = "f16"


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCpp:
    """Serve a GGUF file with a slot per row, anew for every pass: nothing is cached or held while trimkv runs."""

    file: Path
    settings: LlamaSettings = LlamaSettings()

    @classmethod
    def beside(cls, source: Source | None, options: EngineOptions) -> LlamaCpp:
        """Return the peer that reads the file of a model that was found, None for random weights.

        Raises:
            UsageError: there is no such file, it would not run on a CPU, or the wheel is missing.
        """
        if source is None or not source.folder.is_file():
            name = "random weights" if source is None else source.model_id
            raise UsageError(
                f"--compare llama.cpp reads a GGUF file, which {name} {'are' if source is None else 'is'} not",
                hint="trimkv bench MODEL.gguf --compare llama.cpp, or --compare hf",
            )
        if take_device(options.device).type != "cpu":
            raise UsageError("--compare llama.cpp measures on a CPU", hint="add --device cpu")
        _xllamacpp()
        return cls(file=source.folder)

    @property
    def name(self) -> EngineName:
        return "llama.cpp"

    def run(self, prompts: Tensor) -> Timing:
        """Ask for all rows at once, and time them by when their tokens arrive, with torch's number of threads.

        One row's prefill is what llama.cpp itself says; of several it is the time until the last one's first token, in
        which those that are ready decode. Steps count from there until the first row ends; each is one token per row.

        Raises:
            ModelError: llama.cpp cannot load the file.
            TrimkvError: it read or answered less than it was asked to, or not together.
        """
        rows_at_once, context = prompts.shape
        tokens = (rows_at_once - 1) * -(-context // _LEAST_BATCH) + MEASURED_TOKENS
        server = self._serve(rows_at_once, context + tokens)
        started = time.perf_counter()
        with ThreadPoolExecutor(rows_at_once) as pool:
            rows = list(pool.map(lambda ids: _answer(server, ids, tokens), prompts.tolist()))
        last, end = max(rows, key=lambda row: row.begun), min(row.ended for row in rows)
        steps = measured_steps([later - earlier for earlier, later in pairwise(last.times) if later <= end])
        if not steps:
            raise TrimkvError(f"llama.cpp answered {len(rows)} rows one after the other", hint="--rows 1")
        return Timing(
            prefill_s=last.prompt_s if len(rows) == 1 else last.begun - started,
            ttft_s=min(row.begun for row in rows) - started,
            step_s=steps,
        )

    def predict(self, run: Run, case: Case) -> None:
        """Say nothing: llama.cpp plans its memory itself."""

    def about(self) -> dict[str, Any]:
        """Say which wheel it is, for which processors it was compiled, and how it is set."""
        module = _xllamacpp()
        return {
            "engine": self.name,
            "version": f"xllamacpp {module.__version__}",
            "compiled_for": module.get_system_info().strip(" |\n"),
            "threads": torch.get_num_threads(),
            **asdict(self.settings),
        }

    def _serve(self, rows: int, positions: int) -> Any:
        module, threads = _xllamacpp(), torch.get_num_threads()
        flash, types = module.llama_flash_attn_type, module.ggml_type
        params = module.CommonParams()
        params.model.path = str(self.file)
        params.n_parallel = rows
        params.n_ctx = rows * _CELLS * -(-positions // _CELLS)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.flash_attn_type = {
            "auto": flash.LLAMA_FLASH_ATTN_TYPE_AUTO,
            "on": flash.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            "off": flash.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        }[self.settings.flash_attention]
        known = {"f16": types.GGML_TYPE_F16, "q8_0": types.GGML_TYPE_Q8_0}
        params.cache_type_k, params.cache_type_v = known[self.settings.cache_k], known[self.settings.cache_v]
        params.n_gpu_layers, params.no_kv_offload, params.no_op_offload = 0, True, True
        params.verbosity = _SILENT
        try:
            return module.Server(params)
        except RuntimeError as error:
            raise ModelError(
                f"llama.cpp cannot load {self.file.name}: {error}", hint="leave --compare out, or --compare hf"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    prompt_s: float
    times: Sequence[float]  # when each token was there

    @property
    def begun(self) -> float:
        return self.times[0]

    @property
    def ended(self) -> float:
        return self.times[-1]


def _answer(server: Any, ids: Sequence[int], tokens: int) -> _Answer:
    """Let one prompt be answered greedily; tokens that arrive together share the time since those before."""
    arrived: list[tuple[float, dict[str, Any]]] = []
    asked = {
        "prompt": [ids],
        "n_predict": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
        "timings_per_token": True,
    }
    server.handle_completions(asked, lambda said: arrived.append((time.perf_counter(), said)))
    faults = [said["error"]["message"] for _, said in arrived if "error" in said]
    if faults:
        raise TrimkvError(f"llama.cpp: {faults[0]}", hint="measure without --compare")
    times: list[float] = []
    for at, said in arrived:
        new = said["timings"]["predicted_n"] - len(times)
        before = times[-1] if times else at
        times += [before + (at - before) * (n + 1) / new for n in range(new)]
    read = arrived[-1][1]["timings"] if arrived else {"prompt_n": 0}
    if read["prompt_n"] != len(ids) or len(times) != tokens:
        raise TrimkvError(
            f"llama.cpp read {read['prompt_n']} of {len(ids)} prompt tokens and made {len(times)} of {tokens}",
            hint="measure without --compare, or with another release of xllamacpp",
        )
    return _Answer(prompt_s=read["prompt_ms"] / 1e3, times=times)


def _xllamacpp() -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise UsageError("--compare llama.cpp needs xllamacpp", hint="pip install 'trimkv-cli[compare]'") from error
    return xllamacpp
