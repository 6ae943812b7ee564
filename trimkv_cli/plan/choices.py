"""The sizes that a plan may choose from: what a user fixed, and what that leaves open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from trimkv_cli.errors import ContextOverflow, UnsupportedModel, UsageError
from trimkv_cli.model.machine import Machine
from trimkv_cli.model.pins import Pins
from trimkv_cli.model.spec import (
    DTYPE_BYTES,
    Dtype,
    GateSpec,
    KvDtype,
    ModelSpec,
    Quantisation,
    parse_dtype,
    parse_kv_dtype,
    parse_quantisation,
)
from trimkv_cli.plan.run import Run
from trimkv_cli.units import SequenceBytes, format_size

DEFAULT_CHUNK = 512
SMALLEST_CHUNK = 64
UNTRAINED_KV_BUDGET = 1024
SMALLEST_KV_BUDGET = 32
FULL_CACHE_CONTEXT = 4096
MOST_ROWS = {"cpu": 8, "cuda": 64}
PREFILL_TOKENS = {"cuda": 4096}  # read together at most, where that is more than one chunk
FP8_CAPABILITY = (8, 9)
SMALLEST: Mapping[str, Quantisation] = {"cpu": "int4", "cuda": "nf4"}  # form of the devices that quantise


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What a user fixed; None and "auto" leave a size to the plan.

    `command` begins the counter-offers; the flags of this plan are appended to it.
    """

    budget: int | None = None  # bytes of everything; None = no limit
    kv_budget: int | SequenceBytes | None = None
    default_kv_budget: int | None = None  # a profile's wish, which a budget may make smaller
    prefill_chunk: int | None = None  # 0 = the whole prompt
    max_inflight: int | None = None
    context: int | None = None
    dtype: str = "auto"
    quantize: str = "auto"
    kv_dtype: str = "auto"
    device: str = "cpu"  # cpu, cuda or mps
    can_quantise: bool = True  # bitsandbytes is there, which a CPU needs for nf4 alone
    snapshots: int = 0  # of whole rows, to undo turns and to start a failed one again; 0 = no turn follows another
    requests_bytes: int = 0  # of a server, for what it is asked
    machine: Machine = field(default_factory=Machine)
    rebases: bool = False  # sequences may outgrow the model's positions
    pins: Pins | None = None  # None = what the scorer protects by itself
    padded_rows: int = 0  # rows that every decode has, whatever runs
    command: str = "trimkv plan"
    offers: bool = True  # look for commands that would fit where this does not

    def __post_init__(self) -> None:
        sizes = {"--kv-budget": self.kv_budget, "--max-inflight": self.max_inflight, "--context": self.context}
        for flag, size in sizes.items():
            if isinstance(size, int) and size < 1:
                raise UsageError(f"{flag} {size} is too small", hint=f"{flag} needs 1 or more")
        if self.prefill_chunk is not None and self.prefill_chunk < 0:
            raise UsageError(
                f"--prefill-chunk {self.prefill_chunk} is below 0", hint="0 means the whole prompt at once"
            )

    @property
    def flags(self) -> dict[str, str]:
        """Write the options as they would be typed."""
        kv_budget = self.kv_budget.amount if isinstance(self.kv_budget, SequenceBytes) else None
        said = {
            "--budget": self.budget,
            "--kv-budget": f"{kv_budget}B" if kv_budget is not None else self.kv_budget,
            "--max-inflight": self.max_inflight,
            "--prefill-chunk": self.prefill_chunk,
            "--context": self.context,
            "--dtype": None if self.dtype == "auto" else self.dtype,
            "--quantize": None if self.quantize == "auto" else self.quantize,
            "--kv-dtype": None if self.kv_dtype == "auto" else self.kv_dtype,
            "--pin": None if self.pins is None else str(self.pins) or "none",
        }
        return {flag: str(value) for flag, value in said.items() if value is not None}


Precision = tuple[Dtype, Quantisation]  # what weights compute in, and whether the matrices are quantised


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The sizes allowed, each with the preferred one first; what a user fixed has one entry."""

    base: Run  # everything that is fixed; its sizes are replaced by those that are chosen
    kv_budgets: tuple[int, ...]
    trained: int  # what the gate was trained for; fewer slots are the last thing to accept
    precisions: tuple[Precision, ...]
    kv_dtype: KvDtype | None  # None = as the weights
    chunks: tuple[int, ...]
    rows: tuple[int, ...]
    budget_bytes: int | None
    kv_flag: str | None = "--kv-budget"  # what makes the KV budget smaller
    full_cache: bool = False  # it has a slot for each token of the context
    dtype_is_free: bool = True
    can_quantise: bool = True

    @property
    def preferred(self) -> Run:
        """The smallest run that gives up nothing which changes quality much: KV budget and chunk stay."""
        return self.run(self.kv_budgets[0], self.precisions[-1], self.chunks[0], self.rows[-1])

    @property
    def least_slots(self) -> int:
        """The fewest slots per head that are worth offering, which sinks and pins do not fill."""
        fewest = self.kv_budgets[-1]
        sizes = range(min(SMALLEST_KV_BUDGET, fewest), fewest)
        return next((n for n in sizes if self.full_cache or replace(self.base, kv_budget=n).most_pinned < n), fewest)

    def prefill_rows(self, chunk: int) -> tuple[int, ...]:
        """List how many rows' chunks may be read together: a GPU is faster with more, and the results are the same."""
        most = PREFILL_TOKENS.get(self.base.device, 0) // chunk if chunk else 1
        return halvings(max(1, most), 1)

    def run(self, kv_budget: int, precision: Precision, chunk: int, rows: int, prefill_rows: int = 1) -> Run:
        dtype, quantize = precision
        return replace(
            self.base,
            kv_budget=kv_budget,
            prefill_chunk=chunk,
            rows=rows,
            prefill_rows=prefill_rows,
            dtype=dtype,
            quantize=quantize,
            kv_dtype=self.kv_dtype or dtype,
        )

    def fits(self, run: Run) -> bool:
        return self.budget_bytes is None or run.total_bytes <= self.budget_bytes


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest size up to `most` that fits, where all smaller ones do; 0 = none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def halvings(first: int, smallest: int) -> tuple[int, ...]:
    """List a size and its halves down to `smallest`."""
    sizes = [first]
    while sizes[-1] // 2 >= smallest:
        sizes.append(sizes[-1] // 2)
    return tuple(sizes)


def make_choices(spec: ModelSpec, gate: GateSpec, options: PlanOptions) -> Choices:
    """List the sizes that the plan may choose from.

    Raises:
        UsageError: sizes that contradict each other.
        ContextOverflow: a context past the model's positions.
        UnsupportedModel: what this family does not do.
    """
    if options.context is not None and options.context > spec.max_positions:
        raise ContextOverflow(
            f"a context of {options.context} is past the model's {spec.max_positions} positions",
            hint=f"--context {spec.max_positions}",
        )
    _check_hybrid(spec, options)
    precisions = _precisions(spec, options)
    kv_dtype = parse_kv_dtype(options.kv_dtype)
    if kv_dtype == "fp8":
        _check_eight_bits(options)
    kv_budgets = _kv_budgets(spec, gate, options, DTYPE_BYTES[kv_dtype or precisions[0][0]])
    chunks = halvings(DEFAULT_CHUNK, SMALLEST_CHUNK) if options.prefill_chunk is None else (options.prefill_chunk,)
    rows = (options.max_inflight,) if options.max_inflight else tuple(range(_most_rows(options), 0, -1))
    dtype, quantize = precisions[0]
    return Choices(
        base=Run(
            spec=spec,
            gate=gate,
            kv_budget=kv_budgets[0],
            rows=rows[0],
            prefill_chunk=chunks[0],
            dtype=dtype,
            kv_dtype=kv_dtype or dtype,
            quantize=quantize,
            device=options.device,
            longest_prompt=options.context or spec.max_positions,
            padded_rows=options.padded_rows,
            snapshots=options.snapshots,
            requests_bytes=options.requests_bytes,
            rebases=options.rebases,
            pins=options.pins or Pins(),
            counts_runtime=options.budget is not None,
            machine=options.machine,
        ),
        kv_budgets=kv_budgets,
        trained=min(gate.memory_size or kv_budgets[0], kv_budgets[0]),
        precisions=precisions,
        kv_dtype=kv_dtype,
        chunks=chunks,
        rows=rows,
        budget_bytes=options.budget,
        kv_flag=_kv_flag(gate, options),
        full_cache=gate.variant == "none",
        dtype_is_free=not isinstance(options.kv_budget, SequenceBytes),
        can_quantise=_can_quantise(spec, options),
    )


def knows_eight_bits(options: PlanOptions) -> bool:
    """Say whether the device has instructions for keys and values in 8 bits; a GPU that is not known may."""
    here = options.machine.cuda_capability
    return options.device == "cuda" and (here is None or here >= FP8_CAPABILITY)


def _check_eight_bits(options: PlanOptions) -> None:
    if knows_eight_bits(options):
        return
    needs, here = "fp8 keys and values need a GPU", options.machine.cuda_capability
    if options.device == "cuda" and here is not None:
        least, has = (".".join(map(str, version)) for version in (FP8_CAPABILITY, here))
        raise UsageError(f"{needs} of capability {least}, and this one's is {has}", hint="--kv-dtype bf16")
    raise UsageError(f"{needs}, not {options.device}", hint="--kv-dtype bf16")


def _check_hybrid(spec: ModelSpec, options: PlanOptions) -> None:
    """Raise where a model with layers of linear attention is asked for what only one without them does."""
    if spec.state is not None and options.quantize not in ("auto", "none"):
        raise UnsupportedModel(f"trimkv does not quantise {spec.model_type}, a hybrid", hint="--quantize none")
    if spec.state is not None and options.rebases:
        raise UnsupportedModel(
            f"--on-overflow rebase does not know {spec.model_type}, a hybrid", hint="--on-overflow error"
        )


def _most_rows(options: PlanOptions) -> int:
    return options.padded_rows or MOST_ROWS.get(options.device, MOST_ROWS["cpu"])


def _precisions(spec: ModelSpec, options: PlanOptions) -> tuple[Precision, ...]:
    """List the precisions allowed, the highest first; what a budget does not force is never quantised."""
    asked = parse_quantisation(options.quantize)
    if asked is not None:
        _check_form(spec, options, asked)
    if spec.quantised is not None and asked not in (None, "none"):
        raise UsageError(
            f"--quantize {asked}: the checkpoint is quantised already, in {spec.quantised.label}",
            hint="--quantize none, or take the model's original weights",
        )
    levels = (asked,) if asked is not None else _levels(spec, options)
    return tuple((dtype, level) for level in levels for dtype in _dtypes(spec, options))


def _check_form(spec: ModelSpec, options: PlanOptions, asked: Quantisation) -> None:
    """Raise where a form is asked for that the device, or the model, does not have."""
    if asked in ("int4", "stored") and options.device != "cpu":
        what = "packs weights on a CPU only" if asked == "int4" else "keeps a GGUF file's weights packed on a CPU only"
        instead = "nf4" if asked == "int4" and options.device == "cuda" else "none"
        raise UsageError(f"--quantize {asked} {what}, not on {options.device}", hint=f"--quantize {instead}")
    if asked == "stored" and spec.gguf is None:
        raise UsageError("--quantize stored is for GGUF files, and this model is none", hint="--quantize int4")


def _can_quantise(spec: ModelSpec, options: PlanOptions) -> bool:
    """Say whether this model's matrices can be made smaller on this device."""
    able = options.device == "cpu" or (options.device == "cuda" and options.can_quantise)
    return able and spec.quantised is None and spec.state is None


def forms_of(spec: ModelSpec, options: PlanOptions) -> tuple[Quantisation, ...]:
    """List the forms that are worth comparing on a device, the highest precision first."""
    if not _can_quantise(spec, options):
        return ("none",)
    if options.device == "cuda":
        return ("none", "int8", "nf4")
    return ("none", "int8", "stored", "int4") if _can_stay(spec) else ("none", "int8", "int4")


def _can_stay(spec: ModelSpec) -> bool:
    """Say whether something of a GGUF file can stay packed."""
    return spec.gguf is not None and spec.gguf.packing.numel > 0


def _levels(spec: ModelSpec, options: PlanOptions) -> tuple[Quantisation, ...]:
    """List what `auto` may take, the highest precision first: on a CPU a GGUF file stays packed where that pays.

    Elsewhere what no budget forces is never quantised, and int8 is left out where it only costs time.
    """
    if not _can_quantise(spec, options):
        return ("none",)
    forced = options.budget is not None
    if options.device == "cuda":
        return ("none", "int8", "nf4") if forced else ("none",)
    if _can_stay(spec):
        first: tuple[Quantisation, ...] = ("stored",) if options.machine.packed_pays else ("none", "stored")
        return (*first, "int4") if forced else first[:1]
    between: tuple[Quantisation, ...] = ("int8",) if options.machine.int8_pays else ()
    return ("none", *between, "int4") if forced else ("none",)


def _dtypes(spec: ModelSpec, options: PlanOptions) -> tuple[Dtype, ...]:
    """List the dtypes allowed: auto on a CPU is fp32, or where that does not fit the model's own.

    What stays packed computes in the dtype that it was stored for.
    """
    if spec.quantised is not None and not spec.quantised.unpacks:
        if parse_dtype(options.dtype, spec.dtype) != spec.dtype:
            raise UsageError(
                f"--dtype {options.dtype}: a checkpoint in {spec.quantised.label} stays in its own {spec.dtype}",
                hint="leave out --dtype",
            )
        return (spec.dtype,)
    if options.dtype != "auto" or options.device != "cpu" or spec.dtype == "fp32":
        return (parse_dtype(options.dtype, spec.dtype),)
    return ("fp32",) if isinstance(options.kv_budget, SequenceBytes) else ("fp32", spec.dtype)


def _kv_budgets(spec: ModelSpec, gate: GateSpec, options: PlanOptions, dtype_bytes: int) -> tuple[int, ...]:
    asked, pins, turns = options.kv_budget, options.pins or Pins(), options.snapshots > 0
    if isinstance(asked, SequenceBytes):
        asked = _slots_of(spec, asked.amount, dtype_bytes)
    if gate.variant == "none":
        return _full_budgets(spec, options, asked)
    if asked is not None:
        check_room(gate, pins, asked, turns=turns)
        return (asked,)
    wanted = min(options.default_kv_budget or gate.memory_size or UNTRAINED_KV_BUDGET, spec.max_positions)
    between = [gate.memory_size] if gate.memory_size and gate.memory_size < wanted else []
    check_room(gate, pins, wanted, turns=turns)
    sizes = {*halvings(wanted, SMALLEST_KV_BUDGET), *between}
    return tuple(n for n in sorted(sizes, reverse=True) if n > pins.count(0, n, sinks=gate.kept, turns=turns))


def check_room(gate: GateSpec, pins: Pins, kv_budget: int, *, turns: bool) -> None:
    """Raise when sinks of streaming or KeyDiff, or pinned tokens, fill all slots: no later one would ever be kept.

    How long a system message is shows later.

    Raises:
        UsageError: there are as many of them as slots, or more.
    """
    if gate.kept >= kv_budget:
        raise UsageError(
            f"{gate.kept} sinks leave none of {kv_budget} slots per head to later tokens",
            hint=f"--kv-budget {2 * gate.kept}, or --gates streaming:{kv_budget // 2}",
        )
    pins.check(0, kv_budget, sinks=gate.kept, turns=turns)


def _full_budgets(spec: ModelSpec, options: PlanOptions, asked: int | None) -> tuple[int, ...]:
    """Give a full cache as many slots as the context has tokens."""
    if asked is not None and options.context is not None and asked < options.context:
        raise UsageError(
            f"a full cache of {asked} slots cannot hold a context of {options.context}",
            hint=f"--kv-budget {options.context}, or --gates streaming",
        )
    fixed = asked or options.context
    return (fixed,) if fixed else halvings(min(spec.max_positions, FULL_CACHE_CONTEXT), SMALLEST_KV_BUDGET)


def _kv_flag(gate: GateSpec, options: PlanOptions) -> str | None:
    if gate.variant != "none" or options.context is None:
        return "--kv-budget"
    return None if options.kv_budget is not None else "--context"


def _slots_of(spec: ModelSpec, sequence_bytes: int, dtype_bytes: int) -> int:
    """Divide the bytes of a sequence by those of a slot; windows make the last slots cheaper."""
    slots = largest(spec.max_positions, lambda n: spec.kv_bytes_per_row(n, dtype_bytes) <= sequence_bytes)
    if slots == 0:
        least = format_size(spec.kv_bytes_per_row(1, dtype_bytes))
        raise UsageError(
            f"{format_size(sequence_bytes)} hold no slot: one of every head is {least}",
            hint="--kv-budget 512 is slots per head; with a unit it is bytes per sequence: --kv-budget 256MiB",
        )
    return slots
