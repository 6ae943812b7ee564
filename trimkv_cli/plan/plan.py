"""Every byte of a run, and the sizes that keep it within its budget, before anything is loaded."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from trimkv_cli.errors import DoesNotFit, UsageError
from trimkv_cli.events import Notice
from trimkv_cli.model.default_pins import default_pins
from trimkv_cli.model.pins import Pins
from trimkv_cli.model.spec import GateSpec, ModelSpec
from trimkv_cli.plan.choices import (
    DEFAULT_CHUNK,
    SMALLEST,
    SMALLEST_CHUNK,
    Choices,
    PlanOptions,
    Precision,
    check_room,
    halvings,
    largest,
    make_choices,
)
from trimkv_cli.plan.run import Run
from trimkv_cli.units import SequenceBytes, format_size, format_sizes

FAR_BELOW = 4  # the KV budget that gates were trained for over the one in use, from which on it is warned about
_NEARLY_ALL = 7 / 8
_OF_A_STEP = ("workspace", "logits", "dequantised", "loading")  # parts that are free between steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run beside its budget; when it does not fit, `offers` are commands that would."""

    run: Run
    budget_bytes: int | None
    offers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    warnings: tuple[Notice, ...] = ()

    @property
    def fits(self) -> bool:
        return self.budget_bytes is None or self.run.total_bytes <= self.budget_bytes

    def resized(self, kv_budget: int, *, limit: int | None) -> Plan:
        """Return this plan with other slots per head, everything else as it is; `limit` holds while they move.

        Raises:
            UsageError: no slot, or none beside those that gates and pins never let go.
            DoesNotFit: the budget does not hold it, or the limit what is there twice while the slots move.
        """
        if kv_budget < 1:
            raise UsageError("a KV budget of 0 keeps no token", hint="give 1 slot per head or more")
        check_room(self.run.gate, self.run.pins, kv_budget, turns=self.run.snapshots > 0)
        plan = self.with_slots(kv_budget)
        self._ensure_holds(kv_budget, plan.run.total_bytes, self.budget_bytes, limit=limit)
        self._ensure_holds(kv_budget, self._moving_bytes(plan.run), limit, limit=limit, when=" while they change")
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
        run = replace(self.run, counts_runtime=True, loaded=True)
        return replace(self, budget_bytes=budget_bytes, run=run)

    def with_slots(self, kv_budget: int) -> Plan:
        """Return the plan of what is loaded already, with other slots per head, fitting or not."""
        return replace(self, run=replace(self.run, kv_budget=kv_budget, loaded=True))

    def slots_within(self, budget_bytes: int, *, limit: int | None) -> int:
        """Return the most slots per head that a budget holds, with what more of them take under `limit`; 0 = none."""

        def fits(slots: int) -> bool:
            run = self.with_slots(slots).run
            moves = slots <= self.run.kv_budget or limit is None or self._moving_bytes(run) <= limit
            return moves and run.total_bytes <= budget_bytes

        return largest(max(self.run.spec.max_positions, self.run.kv_budget), fits)

    def _moving_bytes(self, new: Run) -> int:
        """Count what is there while slots become those of another run, and more: some of the old beside the new.

        That is one layer; on a CPU, where layers lie together, all keys. No step runs then. Fewer slots move where they
        lie, which takes less than a step does.
        """
        old = self.run
        if new.kv_budget <= old.kv_budget:
            return new.total_bytes
        rows = old.step_rows + old.shares_prefix
        moved = rows * old.kv_bytes_per_row // (2 if old.device == "cpu" else old.spec.num_kv_layers)
        return new.total_bytes - sum(map(new.part_bytes, _OF_A_STEP)) + moved

    def ensure_fits(self) -> None:
        """Raise when the budget is too small.

        Raises:
            DoesNotFit: with the first counter-offer as hint.
        """
        if self.fits:
            return
        needed, budget = format_sizes(self.run.total_bytes, self.budget_bytes or 0)
        short = format_size(self.run.total_bytes - (self.budget_bytes or 0))
        raise DoesNotFit(f"{needed} are needed, and the budget is {budget}: {short} short", hint=self.offers[0])


def make_plan(spec: ModelSpec, gate: GateSpec, options: PlanOptions) -> Plan:
    """Decide the sizes that were left open so that all parts fit the budget.

    Raises:
        UsageError: sizes that contradict each other.
        ContextOverflow: a context past the model's positions.
    """
    choices = make_choices(spec, gate, options)
    found = solve(choices)
    run, pinning = _protected(found or choices.preferred, options)
    offered = found is None and options.offers
    return Plan(
        run=run,
        budget_bytes=options.budget,
        offers=counter_offers(choices, command=options.command, flags=options.flags) if offered else (),
        choices=tuple(_reasons(choices, run, options)),
        warnings=(*_warnings(choices, run, options), *pinning),
    )


def _protected(run: Run, options: PlanOptions) -> tuple[Run, tuple[Notice, ...]]:
    """Pin what the scorer protects by itself, where nobody says."""
    if options.pins is not None:
        return run, ()
    pins, notices = default_pins(run.gate, slots=run.kv_budget, context=options.context or run.spec.max_positions)
    return replace(run, pins=pins), notices


def _reasons(choices: Choices, run: Run, options: PlanOptions) -> Iterator[str]:
    stored = run.spec.quantised
    if stored is not None and stored.unpacks:
        yield f"{stored.label} weights are unpacked to {run.dtype}, the only form that runs here"
    if options.dtype == "auto" and run.dtype != run.spec.dtype:
        yield f"{run.dtype}: the default on a CPU; the model's own is {run.spec.dtype}"
    dtype, quantize = choices.precisions[0]
    best = dtype if quantize == "none" else quantize
    if run.quantize != quantize:
        yield f"{run.quantize} weights: the highest precision that fits, and {best} does not"
    elif run.dtype != dtype:
        yield f"{run.dtype}: the model's own, as {dtype} does not fit"
    yield from _packed_reasons(run, options)
    if run.kv_budget != choices.kv_budgets[0]:
        yield f"{run.kv_budget} slots per head: the budget holds no {choices.kv_budgets[0]}"
    else:
        yield f"{run.kv_budget} slots per head: {_reason(run, options)}"
    yield from _pinned(run)
    if run.prefill_chunk != choices.chunks[0]:
        yield f"chunks of {run.prefill_chunk} prompt tokens: {choices.chunks[0]} do not fit"
    if options.max_inflight is None:
        most = "the most for this device" if run.rows == choices.rows[0] else "as many as fit"
        yield f"{run.rows} sequences at a time: {most}"


def _pinned(run: Run) -> Iterator[str]:
    """Say what is never evicted, how many tokens that is at most, and how many slots it leaves."""
    pins, slots = run.pins, run.kv_budget
    if pins == Pins() or run.gate.variant == "none":
        return
    ends, left, most = pins.ends(slots), slots - run.most_pinned, pins.system_most(slots)
    named = {
        f"the system message{'' if most is None else f' of up to {most} tokens'}": pins.system,
        f"the first {pins.sinks}": pins.sinks,
        f"the newest {pins.recent}": pins.recent,
        f"{ends} at each end of a prompt": ends,
    }
    beside = " beside a system message" if pins.system else ""
    later = f", and {max(0, left - ends)} in a conversation" if ends and not run.snapshots else ""
    said = f"at least {left} of {slots} slots are left{beside}{later}"
    yield f"pinned tokens: {', '.join(name for name, is_set in named.items() if is_set)}; {said}"


def _packed_reasons(run: Run, options: PlanOptions) -> Iterator[str]:
    """Say what stays packed and why, and what its products do with a prompt."""
    machine, packing = run.machine, run.packing
    known = "measured here" if machine.products else "assumed; trimkv doctor --measure tells"
    if run.spec.gguf is not None and options.quantize == "auto" and run.device == "cpu":
        if run.quantize == "none" and run.spec.gguf.packing.numel:
            yield f"unpacked weights: packed ones are slower on this processor ({known})"
        elif run.quantize == "stored" and machine.packed_pays:
            yield f"stored weights: packed ones are faster ({known})"
    if packing.account:
        yield f"{run.quantize} weights: {packing.account}"
    if packing.unpacked and run.quantize == "int4":
        count = packing.unpacked
        said = f"{count} matrices stay" if count > 1 else "1 matrix stays"
        yield f"{said} in {run.dtype}: {run.quantize} takes rows of whole groups of 32 weights, 64 at a time"
    if run.unpacks:
        tokens = f"prompts of {machine.unpacks_from} tokens or more at once"
        yield f"{tokens} are multiplied in {machine.unpacks_to}, each matrix unpacked for it ({known})"


def _reason(run: Run, options: PlanOptions) -> str:
    gate, slots = run.gate, run.kv_budget
    if isinstance(options.kv_budget, SequenceBytes):
        return f"{format_size(options.kv_budget.amount)} per sequence"
    if options.kv_budget is not None:
        return "as asked"
    if slots == run.spec.max_positions < (options.default_kv_budget or gate.memory_size or slots + 1):
        return "as many as the model has positions"
    if gate.variant == "none":
        return "the context, as a full cache evicts nothing" if options.context else "no --context was given"
    if options.default_kv_budget not in (None, gate.memory_size):
        return "the profile's default"
    unsized = "the default of gates made for no number" if gate.by_others else "the default without trained gates"
    return "as trained" if gate.memory_size else unsized


def _warnings(choices: Choices, run: Run, options: PlanOptions) -> Iterator[Notice]:
    gate, trained, slots = run.gate, run.gate.memory_size, run.kv_budget
    if slots != choices.kv_budgets[0]:
        message = f"the budget forces {slots} slots per head instead of {choices.kv_budgets[0]}"
        yield Notice(code="kv_budget_reduced", message=message)
    if run.prefill_chunk != choices.chunks[0]:
        message = f"the budget forces chunks of {run.prefill_chunk} prompt tokens instead of {choices.chunks[0]}"
        yield Notice(code="prefill_chunk_reduced", message=message)
    dtype, quantize = choices.precisions[0]
    if run.dtype != dtype:
        yield Notice(code="dtype_reduced", message=f"the budget forces {run.dtype} instead of {dtype}")
    if run.quantize != quantize:
        best = dtype if quantize == "none" else quantize
        message = f"the budget forces {run.quantize} weights instead of {best}"
        yield Notice(code="weights_quantised", message=message)
    if run.quantize == "nf4" and run.device == "cpu":
        message = "nf4 is slow on a CPU: --quantize int4 is several times as fast there"
        yield Notice(code="slow_nf4", message=message)
    if trained is not None and slots < choices.trained and slots != choices.kv_budgets[0] and gate.trained:
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
    positions = run.spec.max_positions
    if slots > positions:
        message = f"{slots} slots per head are more than the model's {positions} positions: some stay empty"
        yield Notice(code="kv_budget_above_positions", message=message)
    if gate.trained_context and options.context and options.context > gate.trained_context:
        message = f"{gate.id} was trained on up to {gate.trained_context} tokens, not on {options.context}"
        yield Notice(code="context_above_trained", message=message)
    if gate.variant == "rg10":
        message = f"{gate.id} was trained to share its budget between heads; here each head has {slots} slots"
        yield Notice(code="budget_per_head", message=message)


def solve(choices: Choices) -> Run | None:
    """Find the best run within the budget.

    What costs least is given up first: rows, then slots beyond what the gate was trained for, then precision, then the
    chunk (which changes results), and last slots that the gate was trained for. Chunks are read together as far as that
    leaves nearly all rows.
    """
    for kv_budget, precision, chunk in _by_worth(choices):
        fitting = []
        for together in choices.prefill_rows(chunk):
            runs = [choices.run(kv_budget, precision, chunk, rows, together) for rows in choices.rows]
            if choices.fits(runs[-1]):
                fitting.append(next(filter(choices.fits, runs)))
        if fitting:
            return next(run for run in fitting if run.rows >= _NEARLY_ALL * fitting[-1].rows)
    return None


def _by_worth(choices: Choices) -> Iterator[tuple[int, Precision, int]]:
    """Yield KV budget, precision and chunk, the best first."""
    willing = [size for size in choices.kv_budgets if size >= choices.trained]
    for sizes in (willing, *([size] for size in choices.kv_budgets if size < choices.trained)):
        for chunk in choices.chunks:
            for precision in choices.precisions:
                yield from ((size, precision, chunk) for size in sizes)


def counter_offers(choices: Choices, *, command: str, flags: Mapping[str, str]) -> tuple[str, ...]:
    """Write commands that fit where the choices do not: give one thing up, or take a larger budget; two or more."""
    changes = [
        next((change for changed, change in steps if solve(changed) is not None), None)
        for steps in _sacrifices(choices)
    ]
    needed = choices.preferred.total_bytes
    changes += [{"--budget": str(needed)}, _smallest(choices, below=needed)]
    given_up = [change for change in changes if change is not None]
    if len(given_up) < 2:
        given_up.append({"--budget": str(needed + needed // 4)})
    return tuple(_command_line(command, {**flags, **change}) for change in given_up)


def _sacrifices(choices: Choices) -> Iterator[Iterator[tuple[Choices, dict[str, str]]]]:
    """Yield, per size that a user fixed, looser and looser choices with the flags that say so."""
    yield ((replace(choices, rows=(n,)), {"--max-inflight": str(n)}) for n in halvings(choices.rows[-1], 1)[1:])
    chunk, (dtype, quantize) = choices.chunks[-1], choices.precisions[-1]
    chunks = [n for n in halvings(DEFAULT_CHUNK, SMALLEST_CHUNK) if chunk == 0 or n < chunk]
    if chunks:
        yield ((replace(choices, chunks=(n,)), {"--prefill-chunk": str(n)}) for n in chunks)
    if dtype == "fp32" and choices.dtype_is_free:
        yield iter([(replace(choices, precisions=(("bf16", quantize),)), {"--dtype": "bf16"})])
    smallest = SMALLEST.get(choices.base.device)
    if smallest not in (None, quantize) and choices.can_quantise:
        yield iter([(replace(choices, precisions=((dtype, smallest),)), {"--quantize": smallest})])
    if chunk == 0 and choices.kv_flag != "--context":
        lengths = halvings(choices.base.longest_prompt, SMALLEST_CHUNK)[1:]
        yield ((shorter, {"--context": str(n)}) for n in lengths if (shorter := _with_length(choices, n)) is not None)
    if choices.kv_flag is not None:
        sizes = halvings(choices.kv_budgets[-1], choices.least_slots)[1:]
        yield ((_with_slots(choices, n), {str(choices.kv_flag): str(n)}) for n in sizes)


def _with_length(choices: Choices, context: int) -> Choices | None:
    """Give up length; a full cache then has a slot for each token, where the user did not fix fewer."""
    if not choices.full_cache:
        return _with_context(choices, context)
    if len(choices.kv_budgets) > 1:
        return replace(_with_context(choices, context), kv_budgets=(context,))
    return _with_context(choices, context) if context <= choices.kv_budgets[0] else None


def _with_context(choices: Choices, context: int) -> Choices:
    return replace(choices, base=replace(choices.base, longest_prompt=context))


def _with_slots(choices: Choices, slots: int) -> Choices:
    """Give up slots; of a full cache they are the context, and with it the longest prompt."""
    fewer = replace(choices, kv_budgets=(slots,))
    return _with_context(fewer, slots) if choices.kv_flag == "--context" else fewer


def _smallest(choices: Choices, *, below: int) -> dict[str, str] | None:
    """Shrink everything at once, and say which budget that takes; None when it saves nothing."""
    chunk = min(choices.chunks[-1] or SMALLEST_CHUNK, SMALLEST_CHUNK)
    kv_budget = choices.least_slots if choices.kv_flag else choices.kv_budgets[-1]
    dtype, quantize = choices.precisions[-1]
    if dtype == "fp32" and choices.dtype_is_free:
        dtype = "bf16"
    needed = choices.run(kv_budget, (dtype, quantize), chunk, 1).total_bytes
    sizes = {"--max-inflight": "1", "--prefill-chunk": str(chunk), "--dtype": dtype}
    sizes |= {"--quantize": quantize} if quantize != "none" else {}
    if choices.kv_flag:
        sizes[choices.kv_flag] = str(kv_budget)
    return {"--budget": str(max(needed, choices.budget_bytes or 0)), **sizes} if needed < below else None


def _command_line(command: str, flags: Mapping[str, str]) -> str:
    return " ".join([command, *(f"{flag} {shlex.quote(value)}" for flag, value in flags.items())])
