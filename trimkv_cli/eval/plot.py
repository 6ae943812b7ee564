"""Accuracy against budget as a PNG or SVG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimkv_cli.eval.scoring import POLICIES, EvalResult
from trimkv_cli.files import whole_file

# Blue, orange, green and grey that stay apart for colour-blind readers; each line has its own marker too.
_LOOKS = {
    "full": ("#666666", "s"),
    "gates": ("#0072b2", "o"),
    "streaming": ("#d55e00", "^"),
    "random": ("#009e73", "x"),
}


def draw(rows: Sequence[EvalResult], path: str) -> None:
    """Write one panel per task: a line per policy with its 95 % interval, the full cache as a level.

    Raises:
        UsageError: a file that cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(1 + 3.6 * len(tasks), 3.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for panel, task in zip(panels, tasks, strict=True):
        _draw_task(panel, [row for row in rows if row.task == task])
        panel.set(title=task, xlabel="slots per KV head (M)", ylim=(-0.03, 1.03))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    panels[-1].legend(frameon=False)
    form = Path(path).suffix.removeprefix(".").lower() or "png"
    with (
        mpl.rc_context({"svg.hashsalt": "trimkv"}),  # the same rows give the same file
        whole_file(Path(path), hint="check the path given to --plot") as partial,
    ):
        figure.savefig(partial, dpi=160, format=form, metadata={"Date": None} if form == "svg" else None)


def _draw_task(panel: Any, rows: Sequence[EvalResult]) -> None:
    budgets = sorted({row.kv_budget for row in rows if row.kv_budget is not None})
    for policy in POLICIES:
        own = sorted((row for row in rows if row.policy == policy), key=lambda row: row.kv_budget or 0)
        if not own:
            continue
        colour, marker = _LOOKS[policy]
        if policy == "full":
            panel.axhline(own[0].accuracy, color=colour, linestyle="--", label="full cache")
            continue
        places = [budgets.index(row.kv_budget) for row in own if row.kv_budget is not None]
        below = [row.accuracy - row.ci95[0] for row in own]
        above = [row.ci95[1] - row.accuracy for row in own]
        accuracy = [row.accuracy for row in own]
        panel.errorbar(
            places, accuracy, yerr=(below, above), color=colour, marker=marker, capsize=3, label=policy, clip_on=False
        )
    panel.set_xticks(range(len(budgets)), [str(budget) for budget in budgets])
