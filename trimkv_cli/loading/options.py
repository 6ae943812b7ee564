"""What a user may say about model, budget and sampling: plain values, as typed, before anything is resolved."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from trimkv_cli.errors import UsageError
from trimkv_cli.files import as_text
from trimkv_cli.model.spec import Pins, parse_dtype, parse_kv_dtype, parse_quantisation
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.request import SamplingParams
from trimkv_cli.units import parse_budget, parse_kv_budget

_FILTERS = {"top_p", "top_k", "min_p", "top_h"}
_OVERFLOW = ("error", "rebase", "map-reduce")
DETERMINISTIC_ROWS = 8  # every deterministic decode has this many rows, so that no matrix product changes its shape


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Choose a model, its gates, and the memory that it may use; None leaves the choice to profile and plan."""

    model: str | None = None
    profile: str | None = None
    revision: str | None = None
    gates: str = "auto"
    dtype: str = "auto"
    quantize: str = "auto"
    kv_dtype: str = "auto"
    device: str = "auto"
    offline: bool = False
    trust_remote_code: bool = False
    budget: str | None = None
    kv_budget: str | None = None
    prefill_chunk: int | None = None
    context: int | None = None
    on_overflow: str = "error"
    max_inflight: int | None = None
    pin: str | None = None
    deterministic: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"--threads {self.threads} is too small", hint="--threads needs 1 or more")
        for flag, text, parse in self._texts():
            try:
                parse(text)
            except UsageError as error:
                raise UsageError(f"{flag} {text}: {error.message}", hint=error.hint) from None
        Pins.parse(self.pin)
        PlanOptions(max_inflight=self.max_inflight, context=self.context, prefill_chunk=self.prefill_chunk)
        if self.on_overflow not in _OVERFLOW:
            raise UsageError(f"--on-overflow {self.on_overflow} is unknown", hint=f"one of {', '.join(_OVERFLOW)}")

    def _texts(self) -> Iterator[tuple[str, str, Callable[[str], object]]]:
        """Yield what is read later on, so that a mistake is known before anything is loaded."""
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

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    top_h: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    greedy: bool = False
    ignore_eos: bool = False

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
