"""Load what a user asked for and put it together: the one module that knows everyone."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from trimkv_cli.cache.gate_files import check_gates, read_gates
from trimkv_cli.cache.gates import build_gates
from trimkv_cli.engine.devices import (
    cap_allocator,
    cuda_capability,
    device_bytes,
    free_bytes,
    give_back,
    swap_bytes,
    take_device,
    tidy_heap,
)
from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.facts import EngineFacts
from trimkv_cli.engine.text import Text
from trimkv_cli.errors import (
    DoesNotFit,
    ModelError,
    OutOfDeviceMemory,
    TrimkvError,
    UnsupportedModel,
    UsageError,
    is_out_of_memory,
)
from trimkv_cli.events import Notice
from trimkv_cli.loading.assemble import assemble
from trimkv_cli.loading.device_warnings import device_warnings
from trimkv_cli.loading.gguf import gguf_model_config, gguf_tokenizer, gguf_weights
from trimkv_cli.loading.measuring import with_products
from trimkv_cli.loading.options import DETERMINISTIC_ROWS, NOTHING_BESIDE, Beside, EngineOptions
from trimkv_cli.loading.packed import PackingConfig, make_scratch
from trimkv_cli.loading.packed_cache import PackedForm
from trimkv_cli.loading.placing import PlacingConfig, forget_placing, placing_config
from trimkv_cli.loading.quantise import (
    Interrupted,
    QuantisationConfig,
    lazy_tensors,
    misshapen,
    quantisation_config,
)
from trimkv_cli.loading.sources import Source, find_source
from trimkv_cli.loading.stored import read_quantised
from trimkv_cli.model.folders import language_tensors
from trimkv_cli.model.gguf import read_gguf
from trimkv_cli.model.machine import Machine
from trimkv_cli.model.spec import KvDtype, Quantisation
from trimkv_cli.plan.choices import PlanOptions
from trimkv_cli.plan.plan import Plan, make_plan
from trimkv_cli.units import format_size, format_sizes, parse_budget

TORCH_DTYPES: dict[KvDtype, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
_REPORTED: dict[str, Any] = {
    "output_loading_info": True,
    "use_safetensors": True,
    "local_files_only": True,
    "ignore_mismatched_sizes": True,  # they are in the report: otherwise it is printed, or not, and fails
}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "repetition_penalty")


CheckText = Callable[[Text | None], object]


def load_engine(options: EngineOptions) -> Engine:
    """Find the model and its gates, plan their memory, and only then load them.

    Raises:
        TrimkvError: whatever is wrong, before a weight is read where that can be known.
    """
    return load_source(find_source(options, weights=True), options)


def load_source(
    source: Source, options: EngineOptions, *, beside: Beside = NOTHING_BESIDE, check: CheckText | None = None
) -> Engine:
    """Load a model and gates that have been found; raises as `load_parts` does."""
    parts = load_parts(source, options, beside=beside, check=check)
    with _short_of_memory(source):
        return assemble(
            parts.model,
            parts.gates,
            parts.facts,
            text=parts.text,
            kv_dtype=parts.kv_dtype,
            deterministic=options.deterministic,
            rebases=options.on_overflow == "rebase",
        )


@contextmanager
def _short_of_memory(source: Source) -> Iterator[None]:
    """Tell an allocation that failed while something is loaded as that.

    Raises:
        OutOfDeviceMemory: instead of what says so.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OutOfDeviceMemory(
            f"out of memory while {source.model_id} was loaded: {reason}",
            hint="end what else uses the memory, or give a smaller --budget",
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What an engine is assembled from; several may be, one after the other."""

    model: PreTrainedModel
    gates: tuple[nn.Module, ...]
    text: Text | None
    facts: EngineFacts
    kv_dtype: torch.dtype


def load_parts(
    source: Source, options: EngineOptions, *, beside: Beside = NOTHING_BESIDE, check: CheckText | None = None
) -> Parts:
    """Load a model and gates that have been found, planned with what a command keeps beside them.

    `check` looks at the tokenizer, and may raise, before weights are read.

    Raises:
        TrimkvError: they do not fit the budget or each other, or their files are broken.
    """
    started = time.perf_counter()
    device = take_device(options.device)
    if source.spec.quantised is not None:
        source.spec.quantised.ensure_runs(device.type)
    _check_deterministic(options, device)
    plan = plan_for(source, options, device, beside=beside)
    text = load_text(source, trust_remote_code=options.trust_remote_code)
    if source.spec.gguf is not None:
        gc.collect()
        give_back(torch.device("cpu"))  # what building it took beside what it is
    if check is not None:
        check(text)
    torch.set_num_threads(options.threads_or(torch.get_num_threads()))
    if plan.budget_bytes is not None:
        cap_allocator(device, plan.budget_bytes - plan.run.part_bytes("runtime"))
    with _short_of_memory(source):
        gates, warnings = _load_gates(source, plan, device, offline=options.offline)  # small: a misfit shows at once
    kept = PackedForm(source.folder) if plan.run.packs else None
    with tidy_heap():
        model = load_model(
            source,
            TORCH_DTYPES[plan.run.dtype],
            device,
            quantize=plan.run.quantize,
            machine=plan.run.machine,
            kept=kept,
            trust_remote_code=options.trust_remote_code,
        )
    facts = EngineFacts.of(
        model,
        gates,
        plan=plan,
        model_id=source.model_id,
        max_positions=options.context or source.spec.max_positions,
        eos_token_ids=end_token_ids(model, text),
        sampling_defaults={**_sampling_defaults(model), **source.sampling},
        notes=(*source.notes, *_echo(options, plan), *([kept.note] if kept is not None and kept.note else [])),
        warnings=(*source.warnings, *plan.warnings, *warnings, *device_warnings(options.device, device)),
        load_s=time.perf_counter() - started,
    )
    return Parts(model=model, gates=tuple(gates), text=text, facts=facts, kv_dtype=TORCH_DTYPES[plan.run.kv_dtype])


def load_text(source: Source, *, trust_remote_code: bool) -> Text | None:
    """Load the tokenizer of a model that was found; None where it has none. Raises as `Text.from_pretrained` does."""
    if source.folder.is_file():
        return Text(gguf_tokenizer(source.folder), name=source.model_id)
    return Text.from_pretrained(source.folder, offline=True, trust_remote_code=trust_remote_code, name=source.model_id)


def plan_for(source: Source, options: EngineOptions, device: torch.device, *, beside: Beside = NOTHING_BESIDE) -> Plan:
    """Plan the run; the budget must hold it, and what is free now of the device's memory.

    Where weights are to be packed, how fast this processor multiplies is measured once.
    Rows that nobody asked for and no budget limits are as many as that holds. Snapshots lie in host memory, so that
    they count on a CPU only.

    Raises:
        DoesNotFit: it does not.
    """
    total, free = device_bytes(device), free_bytes(device)
    padded = DETERMINISTIC_ROWS if options.deterministic else 0
    asked = source.plan_options(
        options,
        device=device.type,
        memory_bytes=(total, free),
        padded_rows=padded,
        beside=beside,
    )
    if device.type == "cuda":
        asked = replace(asked, machine=replace(asked.machine, cuda_capability=cuda_capability(device)))
    plan = make_plan(source.spec, source.gate, asked)
    if plan.run.packs and not asked.machine.products:
        asked = replace(asked, machine=with_products(asked.machine))
        plan = make_plan(source.spec, source.gate, asked)
    plan.ensure_fits()
    obtainable = min(total, free + swap_bytes(device))
    if _to_come(plan) > obtainable and asked.budget is None and asked.max_inflight is None:
        plan = _with_fewer_rows(source, asked, plan, obtainable)
    if _to_come(plan) > obtainable:
        needed, there, whole = format_sizes(_to_come(plan), obtainable, total)
        raise DoesNotFit(
            f"{needed} are needed, and of the device's {whole} are {there} free",
            hint=_smaller(source, replace(asked, budget=obtainable + asked.machine.runtime_bytes(device.type))),
        )
    return plan


def _to_come(plan: Plan) -> int:
    """Count what a run takes beyond what the process holds already."""
    # Without a budget, what a whole prompt in one chunk takes is not known before the prompt is.
    unknown = plan.run.workspace_bytes if plan.run.prefill_chunk == 0 and plan.budget_bytes is None else 0
    return plan.run.total_bytes - plan.run.part_bytes("runtime") - unknown


def _with_fewer_rows(source: Source, asked: PlanOptions, plan: Plan, most: int) -> Plan:
    """Return a plan of as many rows as memory holds, or else the one there is."""
    for rows in range(plan.run.rows - 1, 0, -1):
        fewer = make_plan(source.spec, source.gate, replace(asked, max_inflight=rows))
        if _to_come(fewer) <= most:
            choice = f"{rows} sequences at a time: as many as the free memory holds"
            return replace(fewer, choices=(*fewer.choices, choice))
    return plan


def _echo(options: EngineOptions, plan: Plan) -> tuple[str, ...]:
    """Say in bytes what a share of memory comes to."""
    if options.budget is None or plan.budget_bytes is None or parse_budget(options.budget).kind == "bytes":
        return ()
    return (f"--budget {options.budget} is {plan.budget_bytes:,} bytes ({format_size(plan.budget_bytes)})",)


def _smaller(source: Source, asked: PlanOptions) -> str:
    """Say what would run within a budget of the memory that is there."""
    plan = make_plan(source.spec, source.gate, asked)
    return f"--budget {plan.budget_bytes} lets trimkv choose smaller sizes" if plan.fits else plan.offers[0]


def _check_deterministic(options: EngineOptions, device: torch.device) -> None:
    if not options.deterministic:
        return
    if device.type != "cpu" or options.dtype not in ("auto", "fp32", "float32"):
        raise UsageError("--deterministic needs the CPU and fp32", hint="--device cpu --dtype fp32")
    if (options.max_inflight or 0) > DETERMINISTIC_ROWS:
        raise UsageError(
            f"--deterministic runs at most {DETERMINISTIC_ROWS} sequences at a time",
            hint=f"--max-inflight {DETERMINISTIC_ROWS}",
        )


def load_model(
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    *,
    quantize: Quantisation = "none",
    machine: Machine | None = None,
    kept: PackedForm | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model's weights, frozen, without gates; what is quantised computes in `dtype`, as suits the `machine`.

    What is packed is read from `kept`, or kept there.

    Raises:
        ModelError: weights that cannot be read, that are missing, or a form that trimkv does not run; or no
            bitsandbytes for weights that are to be quantised.
        OutOfDeviceMemory: there was not enough memory after all.
    """
    with _short_of_memory(source):
        how = _quantisation_config(quantize, dtype, device, machine or Machine(), kept)
        return _load_model(source, dtype, device, how, trust_remote_code=trust_remote_code)


def _quantisation_config(
    quantize: Quantisation, dtype: torch.dtype, device: torch.device, machine: Machine, kept: PackedForm | None
) -> PackingConfig | PlacingConfig | QuantisationConfig | None:
    if device.type == "cuda" and quantize == "none":
        return placing_config(dtype, device)
    if device.type == "cpu" and quantize in ("int4", "int8", "stored"):
        scratch = make_scratch(machine)
        return PackingConfig(None if quantize == "stored" else quantize, scratch, dtype, kept=kept)
    return quantisation_config(quantize, dtype, device)


def _load_model(
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    quantisation: PackingConfig | PlacingConfig | QuantisationConfig | None,
    *,
    trust_remote_code: bool,
) -> PreTrainedModel:
    disable_progress_bar()  # it would write cursor codes into pipes
    stored = source.spec.quantised
    if stored is not None:
        stored.ensure_runs(device.type)
    own = {"quantization_config": quantisation} if stored is None else {}
    try:
        model, report = _read_model(source, device, trust_remote_code=trust_remote_code, dtype=dtype, **own)
    except Interrupted as interrupted:
        _refuse(source, interrupted.error)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        _refuse(source, error)
    if report["mismatched_keys"]:
        raise misshapen(sorted(report["mismatched_keys"]))
    absent = sorted(report["missing_keys"])
    if absent:
        raise ModelError(
            f"{source.model_id}: {len(absent)} weights are missing, {absent[0]} among them", hint="get the folder again"
        )
    _refuse_dynamic_rope(model)
    if isinstance(quantisation, PackingConfig):
        quantisation.keep(model)
    if isinstance(quantisation, PlacingConfig) and stored is None:
        forget_placing(model)
    placed: Any = model if stored is not None and not stored.unpacks else model.to(device)
    loaded: PreTrainedModel = placed.eval().requires_grad_(False)
    return loaded


def _refuse(source: Source, error: Exception) -> NoReturn:
    """Say that weights cannot be loaded, unless the error says more."""
    if isinstance(error, TrimkvError) or is_out_of_memory(error):
        raise error
    raise ModelError(
        f"the weights of {source.model_id} cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0]}",
        hint="get the folder again, or save it again with save_pretrained",
    ) from error


def _read_model(
    source: Source, device: torch.device, *, trust_remote_code: bool, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Read the weights tensor by tensor; only a model that brings its own code is left to transformers."""
    folder = source.folder
    if folder.is_file():
        return _read_gguf(folder, **options)
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    alone = _language_model_config(config, tied=source.spec.tied)
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(alone), None)
    options |= _REPORTED
    if known is None:
        found: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, **options
        )
        return found
    if source.spec.quantised is not None:
        model, report = read_quantised(folder, source.spec.quantised, known, config, device=device, **options)
    else:
        tensors = lazy_tensors(folder)
        weights: Mapping[str, Any] = tensors if alone is config else language_tensors(tensors)
        weights = _to_read(weights, known, alone, options.get("quantization_config"))
        model, report = known.from_pretrained(None, config=alone, state_dict=weights, **options)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    return model, report


def _language_model_config(config: Any, *, tied: bool) -> Any:
    """Return the config of a multimodal model's language model, or the config itself."""
    inner = getattr(config, "text_config", None)
    if inner is None:
        return config
    inner.tie_word_embeddings = tied
    return inner


def _read_gguf(path: Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    header = read_gguf(path)
    config, generation = gguf_model_config(header)
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    stored = gguf_weights(header, known, config, options["dtype"])
    weights = _to_read(stored, known, config, options["quantization_config"])
    model, report = known.from_pretrained(None, config=config, state_dict=weights, **options, **_REPORTED)
    model.generation_config = generation
    return model, report


def _to_read(weights: Mapping[str, Any], known: type, config: Any, quantisation: Any) -> Mapping[str, Any]:
    """Return what to give to `from_pretrained` for stored weights."""
    return quantisation.unread(weights, known, config) if isinstance(quantisation, PackingConfig) else weights


def _refuse_dynamic_rope(model: Any) -> None:
    rope = getattr(model.config, "rope_parameters", None) or {}
    if "dynamic" in str(rope.get("rope_type")):
        raise UnsupportedModel(
            "dynamic NTK RoPE rotates kept keys differently as a sequence grows", hint="take a model with fixed RoPE"
        )


def _load_gates(
    source: Source, plan: Plan, device: torch.device, *, offline: bool
) -> tuple[nn.ModuleList, tuple[Notice, ...]]:
    dtype = TORCH_DTYPES[plan.run.dtype]
    if source.gates_ref is None:
        return build_gates(source.gate, source.spec, {}, dtype=dtype, device=device), ()
    files = read_gates(source.gates_ref.folder("gates", offline=offline), id=source.gate.id)
    warnings = check_gates(source.spec, files.gate, files.tensors, model_id=source.known_as)
    gates = build_gates(files.gate, source.spec, files.tensors, dtype=dtype, device=device, hidden_act=files.hidden_act)
    return gates, (*files.warnings, *warnings)


def end_token_ids(model: PreTrainedModel, text: Text | None) -> frozenset[int]:
    """Collect the ids that end an answer, from all that name some: both configs, the tokenizer and its template."""
    named = (getattr(config, "eos_token_id", None) for config in (model.generation_config, model.config))
    ids = [token_id for said in named for token_id in (said if isinstance(said, list) else [said])]
    own = text.end_ids if text is not None else frozenset()
    return own | {token_id for token_id in ids if token_id is not None}


def _sampling_defaults(model: PreTrainedModel) -> dict[str, Any]:
    """Read the model's own sampling parameters; without `do_sample` a model is greedy."""
    config: Any = model.generation_config
    if not getattr(config, "do_sample", False):
        penalty = getattr(config, "repetition_penalty", None)
        return {"temperature": 0.0} | ({"repetition_penalty": penalty} if penalty is not None else {})
    said = {name: getattr(config, name, None) for name in _SAMPLING}
    return {name: value for name, value in said.items() if value is not None}
