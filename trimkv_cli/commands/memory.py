"""The memory of an engine, gathered for pictures, records and the live panel, and held against its budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trimkv_cli.errors import TrimkvError
from trimkv_cli.events import MemoryUse
from trimkv_cli.ui.live import Panel, Watch, open_watch
from trimkv_cli.ui.panel import Jobs, PanelState, summary_line
from trimkv_cli.ui.plain import print_note
from trimkv_cli.units import format_size, format_sizes

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine


def memory_use(engine: Engine, *, seen: int) -> MemoryUse:
    """Return the bytes of an engine's parts, and what a sequence of `seen` tokens would take in a full cache."""
    facts = engine.facts
    return MemoryUse(
        weights_bytes=facts.weight_bytes,
        gate_bytes=facts.gate_bytes,
        kv_bytes=engine.kv_bytes,
        workspace_bytes=facts.plan.run.workspace_bytes,
        peak_bytes=engine.peak_bytes,
        budget_bytes=facts.plan.budget_bytes,
        seen_tokens=seen,
        full_cache_bytes=facts.plan.run.full_cache_bytes(seen),
    )


def pieces_of(engine: Engine, token_ids: Sequence[int]) -> list[str]:
    """Return what each token says, or its id in brackets where the model has no tokenizer."""
    from trimkv_cli.engine.detokenizer import token_pieces

    if engine.text is None:
        return [f"[{token_id}]" for token_id in token_ids]
    return token_pieces(engine.text.tokenizer, token_ids)


def budget_report(engine: Engine, requested: str | None) -> dict[str, Any]:
    """Return `budget` of a record: as asked for, in bytes, and whether the process has kept to it so far."""
    plan = engine.facts.plan
    held = None if plan.budget_bytes is None else engine.peak_bytes <= plan.budget_bytes
    return {"requested": requested, "bytes": plan.budget_bytes, "kv_budget": plan.run.kv_budget, "honoured": held}


def memory_report(engine: Engine) -> dict[str, Any]:
    """Return `memory` of a record: the parts, what weights are in, the plan's total, each peak measurable here."""
    facts = engine.facts
    return {
        "weights_bytes": facts.weight_bytes,
        "weights": facts.plan.run.precision,
        "bits_per_weight": facts.plan.run.bits_per_weight,
        "gate_bytes": facts.gate_bytes,
        "kv_bytes": engine.kv_bytes,
        "workspace_bytes": facts.plan.run.workspace_bytes,
        "planned_bytes": facts.plan.run.total_bytes,
        "peak_bytes": engine.peak_bytes,
        "peaks": engine.measured_peaks(),
        "undone_steps": engine.stats.undone_steps,
    }


def check_budget(engine: Engine) -> None:
    """Raise when the process has used more than its budget: what was promised did not hold, whatever came of it.

    Raises:
        BudgetNotHeld: it has.
    """
    plan = engine.facts.plan
    if plan.budget_bytes is not None and engine.peak_bytes > plan.budget_bytes:
        raise BudgetNotHeld(engine.peak_bytes, plan.budget_bytes)


class BudgetNotHeld(TrimkvError):
    """Report a peak above the budget; the answers are there."""

    def __init__(self, peak_bytes: int, budget_bytes: int) -> None:
        peak, budget = format_sizes(peak_bytes, budget_bytes)
        super().__init__(
            f"the budget was not held: {peak} at the peak, of {budget}",
            hint="trimkv doctor --measure makes plans closer; fewer rows: --max-inflight 1",
        )


def memory_line(engine: Engine) -> str:
    """Say in one line what was used at most, beside plan and budget."""
    plan = engine.facts.plan
    said, reached = f"memory   {engine.kv_bytes:,} bytes of cache", engine.peak_bytes
    if plan.run.form != "none":
        said += f", {weights_line(engine)}"
    if plan.budget_bytes is None:
        return f"{said}, {format_size(reached)} at the peak"
    held = "held" if reached <= plan.budget_bytes else "NOT held"
    peak, planned, budget = format_sizes(reached, plan.run.total_bytes, plan.budget_bytes)
    return f"{said}, {peak} at the peak, {planned} planned, budget {budget} {held}"


def weights_line(engine: Engine) -> str:
    """Say what the weights are in, and how many bits one takes."""
    run = engine.facts.plan.run
    return f"{run.precision} weights of {run.bits_per_weight} bits"


@contextmanager
def watch(
    llm: Engine,
    *,
    live: bool | None,
    quiet: bool,
    ascii_only: bool = False,
    jobs: Callable[[], Jobs] | None = None,
) -> Iterator[Watch]:
    """Show on stderr what an engine does; call the watch's `tick` after every step.

    On a terminal that is a panel, elsewhere (or with `live` False) a line every ten seconds, with `quiet` nothing.
    Where a panel was, one line stays.
    """
    started = time.monotonic()

    def ask() -> PanelState:
        snapshot = llm.snapshot()
        return PanelState(
            memory=memory_use(llm, seen=0 if snapshot is None else snapshot.seen_tokens),
            run=llm.stats,
            snapshot=snapshot,
            evicted=llm.evicted,
            reading=llm.reading,
            elapsed_s=time.monotonic() - started,
            ttft_s=llm.first_token_s,
            jobs=None if jobs is None else jobs(),
        )

    with open_watch(ask, wanted=live, quiet=quiet, ascii_only=ascii_only) as shown:
        yield shown
    if isinstance(shown, Panel):
        print_note(summary_line(ask()))
