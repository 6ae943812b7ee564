"""Which sizes fit a budget: the first that do, in the order in which a user would give things up."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace

from trimkv_cli.footprint import Shape, Surroundings, footprint
from trimkv_cli.spec import GateSpec, ModelSpec
from trimkv_cli.wish import DEFAULT_CHUNK, QUANTISES, SMALLEST_CHUNK, SMALLEST_KV_BUDGET, Precision, Wish, halvings


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
