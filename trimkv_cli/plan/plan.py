"""Every byte of a run, and the sizes that keep it within its budget, before anything is loaded."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from trimkv_cli.errors import DoesNotFit, UsageError
from trimkv_cli.events import Notice
from trimkv_cli.model.spec import DTYPE_BYTES, Dtype, GateSpec, KvDtype, ModelSpec, Quantisation
from trimkv_cli.plan.bytes import Part, Shape, Surroundings, footprint
from trimkv_cli.plan.choices import (
    DEFAULT_CHUNK,
    QUANTISES,
    SMALLEST_CHUNK,
    SMALLEST_KV_BUDGET,
    PlanOptions,
    Precision,
    Wish,
    check_sinks,
    halvings,
    make_wish,
)
from trimkv_cli.units import SequenceBytes, format_size, format_sizes

__all__ = ["Part", "Plan", "PlanOptions", "make_plan"]

FAR_BELOW = 4  # the KV budget that gates were trained for over the one in use, from which on it is warned about
_OF_A_STEP = ("workspace", "logits", "dequantised", "loading")  # parts that are free between steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The sizes of a run and the bytes of its parts; when `fits` is false, `offers` are commands that would."""

    spec: ModelSpec
    gate: GateSpec
    kv_budget: int
    rows: int
    prefill_chunk: int
    dtype: Dtype
    quantize: Quantisation
    kv_dtype: KvDtype
    device: str
    around: Surroundings
    parts: tuple[Part, ...]
    budget_bytes: int | None
    fits: bool
    offers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    warnings: tuple[Notice, ...] = field(default=())

    @property
    def total_bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def part_bytes(self, name: str) -> int:
        """Return the bytes of one part, 0 when the plan has no such part."""
        return sum(part.bytes for part in self.parts if part.name == name)

    @property
    def workspace_bytes(self) -> int:
        return self.part_bytes("workspace")

    @property
    def kv_bytes_per_row(self) -> int:
        """Return what one sequence's cache takes, whatever its length."""
        return self.spec.kv_bytes_per_row(self.kv_budget, DTYPE_BYTES[self.kv_dtype])

    def full_cache_bytes(self, context: int) -> int:
        """Count what one sequence of `context` tokens takes in a cache that forgets only what left a window."""
        row = self.spec.kv_bytes_per_row(context, DTYPE_BYTES[self.kv_dtype])
        return row - 8 * self.spec.num_kv_heads * sum(
            self.spec.slots(layer, context) for layer in range(self.spec.num_layers)
        )

    def resized(self, kv_budget: int, *, limit: int | None) -> Plan:
        """Return this plan with other slots per head, everything else as it is; `limit` holds while they move.

        Raises:
            UsageError: no slot, or none beside those that gates never let go.
            DoesNotFit: the budget does not hold it, or the limit what is there twice while the slots move.
        """
        if kv_budget < 1:
            raise UsageError("a KV budget of 0 keeps no token", hint="give 1 slot per head or more")
        check_sinks(self.gate, kv_budget)
        plan = self.with_slots(kv_budget)
        self._ensure_holds(kv_budget, plan.total_bytes, self.budget_bytes, limit=limit)
        self._ensure_holds(kv_budget, self._moving_bytes(plan), limit, limit=limit, when=" while they change")
        return plan

    def _ensure_holds(
        self, kv_budget: int, needed: int, allowed: int | None, *, limit: int | None, when: str = ""
    ) -> None:
        if allowed is None or needed <= allowed:
            return
        needs, has = format_sizes(needed, allowed)
        most = self.slots_within(self.budget_bytes or allowed, limit=limit)
        raise DoesNotFit(
            f"{kv_budget} slots per head need {needs}{when}, and the budget is {has}",
            hint=f"up to {most} slots per head fit" if most else "a larger --budget",
        )

    def with_budget(self, budget_bytes: int) -> Plan:
        """Return this plan under another budget of all that the process takes; its slots stay, fitting or not."""
        around = replace(self.around, counts_runtime=True)
        return replace(self, budget_bytes=budget_bytes, around=around).with_slots(self.kv_budget)

    def slots_within(self, budget_bytes: int, *, limit: int | None) -> int:
        """Return the most slots per head that a budget holds, with what more of them take under `limit`; 0 = none."""
        low, high = 0, max(self.spec.max_positions, self.kv_budget)
        while low < high:
            middle = (low + high + 1) // 2
            plan = self.with_slots(middle)
            fits = plan.total_bytes <= budget_bytes
            if middle > self.kv_budget and limit is not None:
                fits &= self._moving_bytes(plan) <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def with_slots(self, kv_budget: int) -> Plan:
        """Return the plan of what is loaded already, with other slots per head, fitting or not."""
        shape = Shape(
            kv_budget=kv_budget,
            prefill_chunk=self.prefill_chunk,
            rows=self.rows,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            quantize=self.quantize,
        )
        parts = footprint(self.spec, self.gate, shape, self.around)
        return replace(self, kv_budget=kv_budget, parts=tuple(part for part in parts if part.name != "loading"))

    def _moving_bytes(self, plan: Plan) -> int:
        """Count what is there while slots become those of another plan, and more: some of the old beside the new.

        That is one layer; on a CPU, where layers lie together, all keys. No step runs then. Fewer slots move where they
        lie, which takes less than a step does.
        """
        if plan.kv_budget <= self.kv_budget:
            return plan.total_bytes
        rows = max(self.rows, self.around.padded_rows) + (self.part_bytes("shared_prefix") > 0)
        moved = rows * self.kv_bytes_per_row // (2 if self.device == "cpu" else self.spec.num_layers)
        return plan.total_bytes - sum(map(plan.part_bytes, _OF_A_STEP)) + moved

    def ensure_fits(self) -> None:
        """Raise when the budget is too small.

        Raises:
            DoesNotFit: with the first counter-offer as hint.
        """
        if self.fits:
            return
        needed, budget = format_sizes(self.total_bytes, self.budget_bytes or 0)
        short = format_size(self.total_bytes - (self.budget_bytes or 0))
        raise DoesNotFit(f"{needed} are needed, and the budget is {budget}: {short} short", hint=self.offers[0])


def make_plan(spec: ModelSpec, gate: GateSpec, options: PlanOptions) -> Plan:
    """Decide the sizes that were left open so that all parts fit the budget.

    Raises:
        UsageError: sizes that contradict each other.
        ContextOverflow: a context past the model's positions.
    """
    wish = make_wish(spec, gate, options)
    found = solve(spec, gate, wish)
    shape = found or wish.preferred
    return Plan(
        spec=spec,
        gate=gate,
        kv_budget=shape.kv_budget,
        rows=shape.rows,
        prefill_chunk=shape.prefill_chunk,
        dtype=shape.dtype,
        quantize=shape.quantize,
        kv_dtype=shape.kv_dtype,
        device=options.device,
        around=wish.around,
        parts=footprint(spec, gate, shape, wish.around),
        budget_bytes=wish.budget_bytes,
        fits=found is not None,
        offers=()
        if found or not options.offers
        else counter_offers(spec, gate, wish, command=options.command, flags=options.flags),
        choices=tuple(_choices(spec, gate, wish, shape, options)),
        warnings=tuple(_warnings(spec, gate, wish, shape, options)),
    )


def _choices(spec: ModelSpec, gate: GateSpec, wish: Wish, shape: Shape, options: PlanOptions) -> Iterator[str]:
    if options.dtype == "auto" and shape.dtype != spec.dtype:
        yield f"{shape.dtype}: the default on a CPU; the model's own is {spec.dtype}"
    best, taken = wish.precisions[0], Precision(shape.dtype, shape.quantize)
    if taken != best and taken.quantize == "none":
        yield f"{taken}: the model's own, as {best} does not fit"
    elif taken != best:
        yield f"{taken} weights: the highest precision that fits, and {best} does not"
    if shape.kv_budget != wish.kv_budgets[0]:
        yield f"{shape.kv_budget} slots per head: the budget holds no {wish.kv_budgets[0]}"
    else:
        yield f"{shape.kv_budget} slots per head: {_reason(gate, options, shape.kv_budget, spec.max_positions)}"
    if shape.prefill_chunk != wish.chunks[0]:
        yield f"chunks of {shape.prefill_chunk} prompt tokens: {wish.chunks[0]} do not fit"
    if options.max_inflight is None:
        most = "the most for this device" if shape.rows == wish.rows[0] else "as many as fit"
        yield f"{shape.rows} sequences at a time: {most}"


def _reason(gate: GateSpec, options: PlanOptions, slots: int, positions: int) -> str:
    if isinstance(options.kv_budget, SequenceBytes):
        return f"{format_size(options.kv_budget.amount)} per sequence"
    if options.kv_budget is not None:
        return "as asked"
    if slots == positions < (options.default_kv_budget or gate.memory_size or slots + 1):
        return "as many as the model has positions"
    if gate.variant == "none":
        return "the context, as a full cache evicts nothing" if options.context else "no --context was given"
    if options.default_kv_budget not in (None, gate.memory_size):
        return "the profile's default"
    return "as trained" if gate.memory_size else "the default without trained gates"


def _warnings(spec: ModelSpec, gate: GateSpec, wish: Wish, shape: Shape, options: PlanOptions) -> Iterator[Notice]:
    trained, slots = gate.memory_size, shape.kv_budget
    if slots != wish.kv_budgets[0]:
        message = f"the budget forces {slots} slots per head instead of {wish.kv_budgets[0]}"
        yield Notice(code="kv_budget_reduced", message=message)
    if shape.prefill_chunk != wish.chunks[0]:
        message = f"the budget forces chunks of {shape.prefill_chunk} prompt tokens instead of {wish.chunks[0]}"
        yield Notice(code="prefill_chunk_reduced", message=message)
    best = wish.precisions[0]
    if shape.dtype != best.dtype:
        yield Notice(code="dtype_reduced", message=f"the budget forces {shape.dtype} instead of {best.dtype}")
    if shape.quantize != best.quantize:
        message = f"the budget forces {shape.quantize} weights instead of {best.dtype}"
        yield Notice(code="weights_quantised", message=message)
    if slots < wish.trained and slots != wish.kv_budgets[0] and gate.trained:
        message = f"{gate.id} was trained for {trained} slots per head, and the budget leaves {slots}"
        yield Notice(code="kv_budget_below_trained", message=message)
    elif trained is not None and slots * FAR_BELOW < trained and slots != options.default_kv_budget:
        message = f"{gate.id} was trained for {trained} slots per head; {slots} are less than a quarter of that"
        yield Notice(code="kv_budget_below_trained", message=message)
    most = gate.largest_memory_size or trained
    if most is not None and slots > most and slots != options.default_kv_budget:
        up_to = "" if most == trained else "up to "
        message = f"{gate.id} was trained for {up_to}{most} slots per head, not for {slots}"
        yield Notice(code="kv_budget_above_trained", message=message)
    if slots > spec.max_positions:
        message = f"{slots} slots per head are more than the model's {spec.max_positions} positions: some stay empty"
        yield Notice(code="kv_budget_above_positions", message=message)
    if gate.trained_context and options.context and options.context > gate.trained_context:
        message = f"{gate.id} was trained on up to {gate.trained_context} tokens, not on {options.context}"
        yield Notice(code="context_above_trained", message=message)
    if gate.variant == "rg10":
        message = f"{gate.id} was trained to share its budget between heads; here each head has {slots} slots"
        yield Notice(code="budget_per_head", message=message)


def total_bytes(spec: ModelSpec, gate: GateSpec, shape: Shape, around: Surroundings) -> int:
    """Sum up all parts."""
    return sum(part.bytes for part in footprint(spec, gate, shape, around))


def solve(spec: ModelSpec, gate: GateSpec, wish: Wish) -> Shape | None:
    """Find the best shape within the budget.

    What costs least is given up first: rows, then slots beyond what the gate was trained for, then precision, then the
    chunk (which changes results), and last slots that the gate was trained for.
    """
    for kv_budget, precision, chunk in _by_worth(wish):
        shapes = [wish.shape(kv_budget, precision, chunk, rows) for rows in wish.rows]
        if _fits(spec, gate, shapes[-1], wish):
            return next(shape for shape in shapes if _fits(spec, gate, shape, wish))
    return None


def _by_worth(wish: Wish) -> Iterator[tuple[int, Precision, int]]:
    """Yield KV budget, precision and chunk, the best first."""
    willing = [size for size in wish.kv_budgets if size >= wish.trained]
    for sizes in (willing, *([size] for size in wish.kv_budgets if size < wish.trained)):
        for chunk in wish.chunks:
            for precision in wish.precisions:
                yield from ((size, precision, chunk) for size in sizes)


def _fits(spec: ModelSpec, gate: GateSpec, shape: Shape, wish: Wish) -> bool:
    return wish.budget_bytes is None or total_bytes(spec, gate, shape, wish.around) <= wish.budget_bytes


def counter_offers(
    spec: ModelSpec, gate: GateSpec, wish: Wish, *, command: str, flags: Mapping[str, str]
) -> tuple[str, ...]:
    """Write commands that fit where the wish does not: give one thing up, or take a larger budget; two or more."""
    changes = [
        next((change for changed, change in steps if solve(spec, gate, changed) is not None), None)
        for steps in _sacrifices(wish)
    ]
    needed = total_bytes(spec, gate, wish.preferred, wish.around)
    changes += [{"--budget": str(needed)}, _smallest(spec, gate, wish, below=needed)]
    given_up = [change for change in changes if change is not None]
    if len(given_up) < 2:
        given_up.append({"--budget": str(needed + needed // 4)})
    return tuple(_command_line(command, {**flags, **change}) for change in given_up)


Step = tuple[Wish, dict[str, str]]


def _sacrifices(wish: Wish) -> Iterator[Iterator[Step]]:
    """Yield, per size that a user fixed, looser and looser wishes with the flags that say so."""
    yield ((replace(wish, rows=(n,)), {"--max-inflight": str(n)}) for n in halvings(wish.rows[-1], 1)[1:])
    chunks = [n for n in halvings(DEFAULT_CHUNK, SMALLEST_CHUNK) if wish.chunks[-1] == 0 or n < wish.chunks[-1]]
    if chunks:
        yield ((replace(wish, chunks=(n,)), {"--prefill-chunk": str(n)}) for n in chunks)
    if wish.precisions[-1].dtype == "fp32" and wish.dtype_is_free:
        halved = tuple(Precision("bf16", precision.quantize) for precision in wish.precisions[-1:])
        yield iter([(replace(wish, precisions=halved), {"--dtype": "bf16"})])
    if wish.precisions[-1].quantize != "nf4" and wish.can_quantise and wish.around.device in QUANTISES:
        smallest = Precision(wish.precisions[-1].dtype, "nf4")
        yield iter([(replace(wish, precisions=(smallest,)), {"--quantize": "nf4"})])
    if wish.chunks[-1] == 0 and wish.kv_flag != "--context":
        lengths = halvings(wish.around.longest_prompt, SMALLEST_CHUNK)[1:]
        yield ((shorter, {"--context": str(n)}) for n in lengths if (shorter := _with_length(wish, n)) is not None)
    if wish.kv_flag is not None:
        sizes = halvings(wish.kv_budgets[-1], SMALLEST_KV_BUDGET)[1:]
        yield ((_with_slots(wish, n), {str(wish.kv_flag): str(n)}) for n in sizes)


def _with_length(wish: Wish, context: int) -> Wish | None:
    """Give up length; a full cache then has a slot for each token, where the user did not fix fewer."""
    if not wish.full_cache:
        return _with_context(wish, context)
    if len(wish.kv_budgets) > 1:
        return replace(_with_context(wish, context), kv_budgets=(context,))
    return _with_context(wish, context) if context <= wish.kv_budgets[0] else None


def _with_context(wish: Wish, context: int) -> Wish:
    return replace(wish, around=replace(wish.around, longest_prompt=context))


def _with_slots(wish: Wish, slots: int) -> Wish:
    """Give up slots; of a full cache they are the context, and with it the longest prompt."""
    fewer = replace(wish, kv_budgets=(slots,))
    return _with_context(fewer, slots) if wish.kv_flag == "--context" else fewer


def _smallest(spec: ModelSpec, gate: GateSpec, wish: Wish, *, below: int) -> dict[str, str] | None:
    """Shrink everything at once, and say which budget that takes; None when it saves nothing."""
    chunk = min(wish.chunks[-1] or SMALLEST_CHUNK, SMALLEST_CHUNK)
    kv_budget = min(wish.kv_budgets[-1], SMALLEST_KV_BUDGET) if wish.kv_flag else wish.kv_budgets[-1]
    last = wish.precisions[-1]
    precision = Precision("bf16", last.quantize) if last.dtype == "fp32" and wish.dtype_is_free else last
    shape = wish.shape(kv_budget, precision, chunk, 1)
    needed = total_bytes(spec, gate, shape, wish.around)
    sizes = {"--max-inflight": "1", "--prefill-chunk": str(chunk), "--dtype": precision.dtype}
    sizes |= {"--quantize": precision.quantize} if precision.quantize != "none" else {}
    if wish.kv_flag:
        sizes[wish.kv_flag] = str(kv_budget)
    return {"--budget": str(max(needed, wish.budget_bytes or 0)), **sizes} if needed < below else None


def _command_line(command: str, flags: Mapping[str, str]) -> str:
    return " ".join([command, *(f"{flag} {shlex.quote(value)}" for flag, value in flags.items())])
