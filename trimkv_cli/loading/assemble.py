"""Assembly of a loaded model, its gates and a plan into an engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trimkv_cli.cache.attention import LongRope, install
from trimkv_cli.cache.rebase import make_rebase
from trimkv_cli.cache.retention_cache import RetentionCache
from trimkv_cli.engine import cpu, cuda
from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.facts import EngineFacts
from trimkv_cli.engine.grammars import Grammars
from trimkv_cli.engine.model_runner import Decoder, ModelRunner
from trimkv_cli.engine.row_files import make_fingerprint
from trimkv_cli.engine.sampler import Sampler
from trimkv_cli.engine.scheduler import Scheduler, SchedulerOptions
from trimkv_cli.engine.text import Text
from trimkv_cli.loading.options import DETERMINISTIC_ROWS


def assemble(
    model: PreTrainedModel,
    gates: Sequence[nn.Module],
    facts: EngineFacts,
    *,
    text: Text | None,
    kv_dtype: torch.dtype,
    deterministic: bool = False,
    prefill_tokens: int | None = None,
    rebases: bool = False,
    evicts: bool = True,
    fast_path: bool = True,
) -> Engine:
    """Install the gates in `model`, allocate the cache that the plan describes, and return the engine.

    The cache has one row more than sequences may run, to keep a shared prefix, when several may. `prefill_tokens`
    bounds rows × chunk of one prefill, by default as planned. With `rebases` sequences may outgrow the model's
    positions. `evicts` is false only to measure what eviction costs: nothing that is generated then has a meaning.
    `fast_path` is false to decode with the modules of transformers. A model serves one engine at a time: closing it
    gives model and gates back as they were, for the next.
    """
    plan, spec = facts.plan, facts.spec
    rows = DETERMINISTIC_ROWS if deterministic else plan.run.rows
    shares = plan.run.rows > 1 and plan.run.prefill_chunk > 0
    fingerprint = make_fingerprint(model, gates, plan)
    cache = RetentionCache(
        rows=rows + shares,
        kv_budget=plan.run.kv_budget,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        windows=spec.windows,
        dtype=kv_dtype,
        device=model.device,
        recent=facts.pins.recent,
        static=facts.gate.static,
        protects=facts.pins.prompt is not None,
        compares_keys=facts.gate.compares_keys,
        evicts=evicts,
        state=spec.state,
    )
    if rebases:
        slots = [layer.slots for layer in cache.layers]
        cache.rebase = make_rebase(model, slots, run=plan.run, positions=facts.max_positions)
    grammars = None if text is None else Grammars(text.tokenizer, facts.eos_token_ids)
    scheduler = Scheduler(
        SchedulerOptions(
            max_rows=plan.run.rows,
            prefill_chunk=plan.run.prefill_chunk,
            prefill_tokens=prefill_tokens or plan.run.prefill_chunk * plan.run.prefill_rows,
            prefill_rows=1 if deterministic else plan.run.rows,
            prefix_row=rows if shares else None,
            long_rope_from=spec.original_max_positions,
        )
    )
    undo = ExitStack()
    try:
        install(model, gates, sinks=facts.pins.sinks, undo=undo)
        runner = ModelRunner(
            model,
            cache,
            Sampler(rows, spec.vocab_size, model.device, grammars, None if text is None else text.think_tags),
            decode_rows=DETERMINISTIC_ROWS if deterministic else None,
            long_rope=LongRope(model, undo) if LongRope.used_by(model.config) else None,
            decoder=_make_decoder(model, gates, cache, rows=rows, sinks=facts.pins.sinks, evicts=evicts, undo=undo)
            if fast_path and not deterministic
            else None,
            pins=facts.pins,
        )
        if model.device.type == "cuda":
            runner.run_ahead(facts.eos_token_ids)
        return Engine(
            facts=facts,
            runner=runner,
            scheduler=scheduler,
            text=text,
            fingerprint=fingerprint,
            undo=undo,
            compact=not deterministic,
        )
    except BaseException:
        undo.close()
        raise


def _make_decoder(
    model: PreTrainedModel, gates: Sequence[nn.Module], cache: RetentionCache, *, rows: int, **how: Any
) -> Decoder | None:
    """Return what decodes faster than the modules of transformers on this device, if anything does."""
    if model.device.type == "cpu":
        return cpu.make_decoder(model, gates, cache, rows=rows, **how)
    return cuda.make_decoder(model, gates, cache, **how)
