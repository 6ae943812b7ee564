"""transformers' own generate as a peer: the same weights, with a cache that keeps everything."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import StoppingCriteria
from transformers.cache_utils import DynamicCache

from trimkv_cli.bench.shapes import Network
from trimkv_cli.bench.speed import CHUNK, MEASURED_TOKENS, Case, EngineName, Timing, measured_steps, row_peak_bytes
from trimkv_cli.cache.releases import cache_argument, forward_logits
from trimkv_cli.engine.devices import reset_peak, wait_for
from trimkv_cli.plan.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Transformers:
    """Read the prompt in chunks into a DynamicCache, and let transformers' generate go on from there."""

    network: Network

    @property
    def name(self) -> EngineName:
        return "hf"

    @torch.inference_mode()
    def run(self, prompts: Tensor) -> Timing:
        """Measure on the network's own model and device."""
        model: Any = self.network.model
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        gc.collect()  # engines are circles, and hold their caches
        reset_peak(model.device)
        ids = prompts.to(model.device)
        cache, clock = DynamicCache(config=model.config), _Clock()
        started = time.perf_counter()
        for chunk in torch.split(ids[:, :-1], CHUNK, dim=1):
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
        first = clock.times[0] - started
        seconds = measured_steps([later - earlier for earlier, later in pairwise(clock.times)])
        return Timing(prefill_s=first, ttft_s=first, step_s=seconds, peak_bytes=row_peak_bytes(model.device))

    def predict(self, run: Run, case: Case) -> int:
        """Count the weights and a cache of all prompt tokens."""
        return run.part_bytes("weights") + case.rows * run.full_cache_bytes(case.context)

    def about(self) -> dict[str, Any]:
        """Say which release of transformers it is."""
        return {"engine": self.name, "version": transformers.__version__}


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Note when each token of `generate` is there; never stops it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        wait_for(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
