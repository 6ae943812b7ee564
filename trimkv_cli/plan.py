"""Every byte of a run, and the sizes that keep it within its budget, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from trimkv_cli.errors import ContextOverflow, DoesNotFit, UsageError
from trimkv_cli.footprint import Part, Shape, Surroundings, footprint
from trimkv_cli.solve import SMALLEST_CHUNK, SMALLEST_KV_BUDGET, Wish, counter_offers, halvings, solve
from trimkv_cli.spec import DTYPE_BYTES, Dtype, GateSpec, ModelSpec, parse_dtype
from trimkv_cli.units import SequenceBytes, format_size

DEFAULT_CHUNK = 512
UNTRAINED_KV_BUDGET = 1024
FULL_CACHE_CONTEXT = 4096
MOST_ROWS = {"cpu": 8, "cuda": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Warning:
    """What a user should know although the work goes on."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What a user fixed; None and "auto" leave a size to the plan.

    `command` begins the counter-offers; the flags of this plan are appended to it.
    """

    budget: int | None = None  # bytes of everything; None = no limit
    kv_budget: int | SequenceBytes | None = None
    prefill_chunk: int | None = None  # 0 = the whole prompt
    max_inflight: int | None = None
    context: int | None = None
    dtype: str = "auto"
    kv_dtype: str = "auto"
    device: str = "cpu"  # cpu, cuda or mps
    padded_rows: int = 0  # rows that every decode has, whatever runs
    command: str = "trimkv plan"

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
            "--kv-dtype": None if self.kv_dtype == "auto" else self.kv_dtype,
        }
        return {flag: str(value) for flag, value in said.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The sizes of a run and the bytes of its parts; when `fits` is false, `offers` are commands that would."""

    spec: ModelSpec
    gate: GateSpec
    kv_budget: int
    rows: int
    prefill_chunk: int
    dtype: Dtype
    kv_dtype: Dtype
    device: str
    parts: tuple[Part, ...]
    budget_bytes: int | None
    fits: bool
    offers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    warnings: tuple[Warning, ...] = field(default=())

    @property
    def total_bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def part_bytes(self, name: str) -> int:
        """Return the bytes of one part, 0 when the plan has no such part."""
        return sum(part.bytes for part in self.parts if part.name == name)

    @property
    def workspace_bytes(self) -> int:
        return self.part_bytes("workspace")

    def full_cache_bytes(self, context: int) -> int:
        """Count what one sequence of `context` tokens takes in a cache that forgets only what left a window."""
        row = self.spec.kv_bytes_per_row(context, DTYPE_BYTES[self.kv_dtype])
        return row - 8 * self.spec.num_kv_heads * sum(
            self.spec.slots(layer, context) for layer in range(self.spec.num_layers)
        )

    def ensure_fits(self) -> None:
        """Raise when the budget is too small.

        Raises:
            DoesNotFit: with the first counter-offer as hint.
        """
        if self.fits:
            return
        needed, budget = format_size(self.total_bytes), format_size(self.budget_bytes or 0)
        raise DoesNotFit(f"{needed} are needed, and the budget is {budget}", hint=self.offers[0])


def make_plan(spec: ModelSpec, gate: GateSpec, options: PlanOptions) -> Plan:
    """Decide the sizes that were left open so that all parts fit the budget.

    Raises:
        UsageError: sizes that contradict each other.
        ContextOverflow: a context past the model's positions.
    """
    wish = _wish(spec, gate, options)
    found = solve(spec, gate, wish)
    shape = found or wish.preferred
    return Plan(
        spec=spec,
        gate=gate,
        kv_budget=shape.kv_budget,
        rows=shape.rows,
        prefill_chunk=shape.prefill_chunk,
        dtype=shape.dtype,
        kv_dtype=shape.kv_dtype,
        device=options.device,
        parts=footprint(spec, gate, shape, wish.around),
        budget_bytes=wish.budget_bytes,
        fits=found is not None,
        offers=() if found else counter_offers(spec, gate, wish, command=options.command, flags=options.flags),
        choices=tuple(_choices(spec, gate, wish, shape, options)),
        warnings=tuple(_warnings(gate, wish, shape, options)),
    )


def _wish(spec: ModelSpec, gate: GateSpec, options: PlanOptions) -> Wish:
    if options.context is not None and options.context > spec.max_positions:
        raise ContextOverflow(
            f"a context of {options.context} is past the model's {spec.max_positions} positions",
            hint=f"--context {spec.max_positions}",
        )
    dtypes = _dtypes(spec, options)
    kv_dtype = None if options.kv_dtype == "auto" else parse_dtype(options.kv_dtype, dtypes[0])
    chunk = options.prefill_chunk
    return Wish(
        kv_budgets=_kv_budgets(spec, gate, options, DTYPE_BYTES[kv_dtype or dtypes[0]]),
        dtypes=dtypes,
        kv_dtype=kv_dtype,
        chunks=halvings(DEFAULT_CHUNK, SMALLEST_CHUNK) if chunk is None else (chunk,),
        rows=(options.max_inflight,) if options.max_inflight else tuple(range(_most_rows(options), 0, -1)),
        around=Surroundings(
            longest_prompt=options.context or spec.max_positions,
            padded_rows=options.padded_rows,
            device=options.device,
            counts_runtime=options.budget is not None,
        ),
        budget_bytes=options.budget,
        kv_flag=_kv_flag(gate, options),
        dtype_is_free=not isinstance(options.kv_budget, SequenceBytes),
    )


def _most_rows(options: PlanOptions) -> int:
    return options.padded_rows or MOST_ROWS.get(options.device, MOST_ROWS["cpu"])


def _dtypes(spec: ModelSpec, options: PlanOptions) -> tuple[Dtype, ...]:
    """List the dtypes allowed: auto on a CPU is fp32, or where that does not fit the model's own."""
    if options.dtype != "auto" or options.device != "cpu" or spec.dtype == "fp32":
        return (parse_dtype(options.dtype, spec.dtype),)
    return ("fp32",) if isinstance(options.kv_budget, SequenceBytes) else ("fp32", spec.dtype)


def _kv_budgets(spec: ModelSpec, gate: GateSpec, options: PlanOptions, dtype_bytes: int) -> tuple[int, ...]:
    asked = options.kv_budget
    if isinstance(asked, SequenceBytes):
        asked = _slots_of(spec, asked.amount, dtype_bytes)
    if gate.variant == "none":
        return _full_budgets(spec, options, asked)
    if asked is not None:
        return (asked,)
    return halvings(gate.memory_size or UNTRAINED_KV_BUDGET, SMALLEST_KV_BUDGET)


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
    low, high = 0, spec.max_positions
    while low < high:
        middle = (low + high + 1) // 2
        fits = spec.kv_bytes_per_row(middle, dtype_bytes) <= sequence_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    if low == 0:
        least = format_size(spec.kv_bytes_per_row(1, dtype_bytes))
        raise UsageError(f"{format_size(sequence_bytes)} hold no slot: one of every head is {least}")
    return low


def _choices(spec: ModelSpec, gate: GateSpec, wish: Wish, shape: Shape, options: PlanOptions) -> Iterator[str]:
    if options.dtype == "auto" and shape.dtype != spec.dtype:
        yield f"{shape.dtype}: the default on a CPU; the model's own is {spec.dtype}"
    if shape.dtype != wish.dtypes[0]:
        yield f"{shape.dtype}: the model's own, as {wish.dtypes[0]} does not fit"
    if shape.kv_budget != wish.kv_budgets[0]:
        yield f"{shape.kv_budget} slots per head: the budget holds no {wish.kv_budgets[0]}"
    else:
        yield f"{shape.kv_budget} slots per head: {_reason(gate, options)}"
    if shape.prefill_chunk != wish.chunks[0]:
        yield f"chunks of {shape.prefill_chunk} prompt tokens: {wish.chunks[0]} do not fit"
    if options.max_inflight is None:
        most = "the most for this device" if shape.rows == wish.rows[0] else "as many as fit"
        yield f"{shape.rows} sequences at a time: {most}"


def _reason(gate: GateSpec, options: PlanOptions) -> str:
    if isinstance(options.kv_budget, SequenceBytes):
        return f"{format_size(options.kv_budget.amount)} per sequence"
    if options.kv_budget is not None:
        return "as asked"
    if gate.variant == "none":
        return "the context; a full cache evicts nothing" if options.context else "a context that trimkv chose"
    return "as trained" if gate.memory_size else "the default without trained gates"


def _warnings(gate: GateSpec, wish: Wish, shape: Shape, options: PlanOptions) -> Iterator[Warning]:
    trained, slots = gate.memory_size, shape.kv_budget
    if slots != wish.kv_budgets[0]:
        message = f"the budget forces {slots} slots per head instead of {wish.kv_budgets[0]}"
        yield Warning(code="kv_budget_reduced", message=message)
    if shape.prefill_chunk != wish.chunks[0]:
        message = f"the budget forces chunks of {shape.prefill_chunk} prompt tokens instead of {wish.chunks[0]}"
        yield Warning(code="prefill_chunk_reduced", message=message)
    if shape.dtype != wish.dtypes[0]:
        yield Warning(code="dtype_reduced", message=f"the budget forces {shape.dtype} instead of {wish.dtypes[0]}")
    if trained is not None and slots > trained:
        message = f"{gate.id} was trained for {trained} slots per head, not for {slots}"
        yield Warning(code="kv_budget_above_trained", message=message)
    if gate.trained_context and options.context and options.context > gate.trained_context:
        message = f"{gate.id} was trained on up to {gate.trained_context} tokens, not on {options.context}"
        yield Warning(code="context_above_trained", message=message)
    if gate.variant == "rg10":
        message = f"{gate.id} was trained to share its budget between heads; here each head has {slots} slots"
        yield Warning(code="budget_per_head", message=message)
