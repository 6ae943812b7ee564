"""Options of model, memory and sampling: plain values as typed, before anything is resolved."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from trimkv_cli.errors import UsageError
from trimkv_cli.files import as_text
from trimkv_cli.request import SamplingParams
from trimkv_cli.settings import option
from trimkv_cli.units import parse_budget, parse_kv_budget

_model = partial(option, panel="Model", setting=True)
_memory = partial(option, panel="Memory", setting=True)
_sampling = partial(option, panel="Sampling", setting=True)
_FILTERS = {"top_p", "top_k", "min_p", "top_h"}
_OVERFLOW = ("error", "rebase", "map-reduce")
DETERMINISTIC_ROWS = 8  # every deterministic decode has this many rows, so that no matrix product changes its shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a command holds in host memory beside the engine: copies of rows, and requests that it reads."""

    snapshots: int = 0
    requests_bytes: int = 0


NOTHING_BESIDE = Beside()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Choose a model, its gates, and the memory that it may use; None leaves the choice to profile and plan."""

    model: str | None = _model(
        None,
        "Profile, hub id (repo:Q4_K_M: its GGUF file), ollama:NAME, folder or GGUF file; default: mini.",
        "MODEL",
        short="-m",
    )
    profile: str | None = _model(None, "Take model, gates and defaults from this profile.", "NAME")
    revision: str | None = _model(None, "Branch, tag or commit of a hub model.", "REV")
    gates: str = _model(
        "auto",
        "auto, a hub id or folder of trained gates, streaming[:SINKS] (sinks and recent tokens), keydiff (keys unlike"
        " the others; no training) or none (full cache).",
        "GATES",
    )
    dtype: str = _model("auto", "auto, bf16, fp16 or fp32. auto on a CPU is fp32.", "TYPE")
    quantize: str = _model(
        "auto",
        "none, int8, int4 (CPU), nf4 (bitsandbytes), stored (GGUF). auto is the highest precision that --budget holds"
        " (without one, none); on a CPU a GGUF file stays packed as stored.",
        "TYPE",
    )
    kv_dtype: str = _memory(
        "auto",
        "Type of the cached keys and values: fp32, bf16, fp16 or, on a GPU, fp8; auto = as the weights.",
        "TYPE",
    )
    device: str = _model("auto", "auto, cuda, cuda:N, mps or cpu.", "DEVICE")
    offline: bool = _model(False, "Never use the network; exit 6 when a file is missing.")
    trust_remote_code: bool = _model(False, "Run Python code that comes with the model.")
    budget: str | None = _memory(None, "All memory that the process may use, as 8GiB or 80%.", "SIZE", short="-b")
    kv_budget: str | None = _memory(
        None, "Slots per KV head (512) or bytes per sequence (256MiB); default: as trained.", "M|SIZE"
    )
    prefill_chunk: int | None = _memory(
        None, "Prompt tokens per chunk (default 512); 0 = the whole prompt at once.", "N"
    )
    context: int | None = _memory(
        None, "Longest sequence to allow, in tokens; default: the model's own.", "N", short="-c"
    )
    on_overflow: str = _memory(
        "error",
        "Past the model's positions: error, rebase (new positions for what is kept) or map-reduce (summarize only).",
        "HOW",
    )
    max_inflight: int | None = _memory(
        None, "Sequences that run at the same time; default: from the plan.", "N", flag="--max-inflight --rows"
    )
    pin: str | None = _memory(
        None,
        "Never evict system (system:25%: if it has up to a quarter of the slots), sinks:N (the first), recent:N (the"
        " newest N tokens) or, until the next prompt, prompt:10% (a tenth of the slots for each of a prompt's ends);"
        " commas join; none: nothing at all.",
        "WHAT",
    )
    deterministic: bool = _memory(False, "The same tokens for a request whatever runs beside it (CPU, fp32; slower).")
    threads: int | None = _memory(None, "CPU threads; default: all cores.", "N")

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads} is too small", hint="--threads needs 1 or more")
        for flag, text, parse in self._texts():
            try:
                parse(text)
            except UsageError as error:
                raise UsageError(f"{flag} {text}: {error.message}", hint=error.hint) from None
        if self.pin is not None:
            from trimkv_cli.model.pins import Pins

            Pins.parse(self.pin)
        if (self.max_inflight, self.context, self.prefill_chunk) != (None, None, None):
            from trimkv_cli.plan.choices import PlanOptions

            PlanOptions(max_inflight=self.max_inflight, context=self.context, prefill_chunk=self.prefill_chunk)
        if self.on_overflow not in _OVERFLOW:
            raise UsageError(f"--on-overflow {self.on_overflow} is unknown", hint=f"one of {', '.join(_OVERFLOW)}")

    def _texts(self) -> Iterator[tuple[str, str, Callable[[str], object]]]:
        """Yield what is said and read later on, so that a mistake is known before anything is loaded."""
        if {self.dtype, self.kv_dtype, self.quantize} != {"auto"}:  # what imports much
            from trimkv_cli.model.spec import parse_dtype, parse_kv_dtype, parse_quantisation

            yield "--dtype", self.dtype, lambda text: parse_dtype(text, "fp32")
            yield "--kv-dtype", self.kv_dtype, parse_kv_dtype
            yield "--quantize", self.quantize, parse_quantisation
        yield "--device", self.device, _check_device
        if self.budget is not None:
            yield "--budget", self.budget, parse_budget
        for size in (self.kv_budget or "").split(",") if self.kv_budget is not None else ():
            yield "--kv-budget", size, parse_kv_budget

    def threads_or(self, default: int) -> int:
        """Return how many threads torch computes with: `default`, unless these options say."""
        return self.threads or (1 if self.deterministic else default)


def _check_device(text: str) -> None:
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text) is None:
        raise UsageError(f"{text!r} is not a device", hint="auto, cpu, cuda, cuda:1 or mps")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """Override the model's own generation defaults; None keeps the model's value."""

    max_tokens: int | None = _sampling(None, "Most tokens to generate.", "N", short="-n")
    temperature: float | None = _sampling(None, "0 = greedy; default: the model's own.", "T")
    top_p: float | None = _sampling(None, "Keep the likeliest tokens up to this probability mass.", "P")
    top_k: int | None = _sampling(None, "Keep the K likeliest tokens; 0 = all.", "K")
    min_p: float | None = _sampling(None, "Drop tokens below P times the likeliest one's probability.", "P")
    top_h: float | None = _sampling(None, "Keep tokens up to this share of the distribution's entropy.", "H")
    repetition_penalty: float | None = _sampling(None, "Above 1: make tokens seen before less likely.", "X")
    seed: int | None = _sampling(None, "Same seed, same prompt, same tokens.", "N")
    stop: list[str] | None = _sampling(None, "Stop before this text; may be given several times.", "TEXT")
    greedy: bool = _sampling(False, "Always take the likeliest token (temperature 0).")
    think_budget: int | None = _sampling(
        None,
        "Close the reasoning of a model that thinks after N tokens; 0 = no reasoning. A JSON format leaves no room for"
        " any.",
        "N",
    )
    ignore_eos: bool = _sampling(False, "Go on to --max-tokens even past an end-of-text token.")

    def __post_init__(self) -> None:
        if self.stop is not None:
            object.__setattr__(self, "stop", [as_text(text, "--stop") for text in self.stop])
        if self.greedy and self.temperature:
            raise UsageError(
                f"--greedy and --temperature {self.temperature:g} are both given", hint="leave one of them out"
            )
        self.resolve({})  # a value out of range is known before a model is loaded

    def resolve(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Lay these options over the model's `defaults`; a filter said here makes a greedy model sample.

        Raises:
            UsageError: a value outside its range.
        """
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("greedy", "stop")}
        said = {name: value for name, value in said.items() if value is not None}
        values = {**defaults, **said}
        if "temperature" not in said and values.get("temperature") == 0.0 and _FILTERS & said.keys():
            values["temperature"] = 1.0
        if self.stop is not None:
            values["stop"] = tuple(self.stop)
        if self.greedy:
            values["temperature"] = 0.0
        return SamplingParams(**values)
