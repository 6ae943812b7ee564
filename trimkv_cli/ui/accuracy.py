"""Tables of accuracy and speed; accuracy or perplexity against the budget as a plot of characters, a PNG or an SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from trimkv_cli.eval.scoring import EVERY_POLICY, EvalResult
from trimkv_cli.files import whole_file
from trimkv_cli.ui.plain import columns
from trimkv_cli.units import format_size

if TYPE_CHECKING:
    from trimkv_cli.bench.speed import SpeedRow

_MARKS = {
    "full": "F",
    "gates": "G",
    "static": "Z",
    "keydiff": "K",
    "streaming": "S",
    "protected": "P",
    "random": "R",
    "map-reduce": "M",
}
_LEVELS = 10
_COLUMN = 8
_WIDTH = 200  # more than the table takes: it goes into pipes too, and is never cut


def accuracy_report(rows: Sequence[EvalResult]) -> str:
    """Return the table, then one plot per task; plain characters, for a pipe as well as for a terminal."""
    tasks = dict.fromkeys(row.task for row in rows)
    plots = (accuracy_plot(task, [row for row in rows if row.task == task]) for task in tasks)
    return "\n\n".join([_table(rows), *plots])


def _table(rows: Sequence[EvalResult]) -> str:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for heading in ("M", "accuracy", "95 %", "n", "said", "log p", "tok/s", "cache", "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    out = StringIO()
    Console(file=out, width=_WIDTH, color_system=None, markup=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").split("\n"))


def _cells(row: EvalResult) -> tuple[str, ...]:
    return (
        row.task,
        row.policy,
        "all" if row.kv_budget is None else str(row.kv_budget),
        *_score(row),
        str(row.n),
        "–" if row.answer_tokens is None else f"{row.answer_tokens:.1f}",
        "–" if row.answer_logprob is None else f"{row.answer_logprob:.3f}",
        f"{row.decode_tps:.0f}" if row.decode_tps else "–",
        format_size(row.kv_bytes) if row.kv_bytes else "–",
        format_size(row.peak_bytes) if row.peak_bytes else "–",
    )


def _score(row: EvalResult) -> tuple[str, str]:
    """Say how good a row is and its interval: a share, or of a text its perplexity, and that of the full cache's."""
    if row.nats is not None:
        times = "" if row.ratio is None else f" ×{row.ratio:.3f}"
        between = "–" if row.ci95 is None else "–".join(f"{math.exp(end):.2f}" for end in row.ci95)
        return f"ppl {math.exp(row.nats):.2f}{times}", between
    if row.accuracy is None:
        return "–", "–"
    return f"{row.accuracy:.1%}", "–" if row.ci95 is None else "–".join(f"{end * 100:.1f}" for end in row.ci95)


@dataclass(frozen=True, slots=True)
class _Scale:
    """What a plot's height stands for: shares of right answers, or nats a token from the best to the worst."""

    name: str
    low: float
    high: float

    @classmethod
    def of(cls, rows: Sequence[EvalResult]) -> _Scale:
        nats = [row.nats for row in rows if row.nats is not None]
        if not nats:
            return cls("accuracy", 0.0, 1.0)
        return cls("perplexity", min(nats), max(*nats, min(nats) + 0.01))

    def level(self, row: EvalResult) -> int:
        value = row.nats if row.nats is not None else row.accuracy or 0.0
        return round((value - self.low) / (self.high - self.low) * _LEVELS)

    def label(self, level: int) -> str:
        value = self.low + (self.high - self.low) * level / _LEVELS
        return f"{value:5.0%}" if self.name == "accuracy" else f"{math.exp(value):5.1f}"


def accuracy_plot(task: str, rows: Sequence[EvalResult]) -> str:
    """Draw a grid with one column per budget; where several policies meet, all their letters stand side by side."""
    scale = _Scale.of(rows)
    budgets: list[int | None] = [*sorted({row.kv_budget for row in rows if row.kv_budget is not None})]
    columns = budgets or [None]
    there = dict.fromkeys(row.policy for row in rows)
    present = [*(policy for policy in EVERY_POLICY if policy in there), *(p for p in there if p not in EVERY_POLICY)]
    lines = [f"{task}: {scale.name} against M   " + "  ".join(f"{_mark(policy)} {policy}" for policy in present)]
    for level in range(_LEVELS, -1, -1):
        cells = (_marks(rows, budget, level, scale).center(_COLUMN) for budget in columns)
        lines.append(f"{scale.label(level)} |{''.join(cells)}".rstrip())
    lines.append("      +" + "-" * (_COLUMN * len(columns)))
    lines.append(("       " + "".join(str(budget).center(_COLUMN) for budget in budgets)).rstrip())
    return "\n".join(lines)


def _mark(policy: str) -> str:
    """Return a policy's letter; what other programs call theirs has small ones."""
    return _MARKS.get(policy) or policy[:1].lower()


def _marks(rows: Sequence[EvalResult], budget: int | None, level: int, scale: _Scale) -> str:
    here = (row for row in rows if row.kv_budget in (None, budget) and scale.level(row) == level)
    order = "".join(_MARKS.values())
    return "".join(sorted({_mark(row.policy) for row in here}, key=lambda mark: (order.find(mark) % 99, mark)))


_HEAD = ("engine", "M", "rows", "context", "prefill tok/s", "decode tok/s", "ms/token p50", "p95", "TTFT s", "peak")


def speed_lines(rows: Sequence[SpeedRow]) -> Iterator[str]:
    """Yield the heading and a line per measurement, in columns."""
    return columns([_HEAD, *(_speed_cells(row) for row in rows)])


def _speed_cells(row: SpeedRow) -> tuple[str, ...]:
    return (
        row.engine,
        "all" if row.kv_budget is None else f"{row.kv_budget} (none evicted)" if row.keeps_all else str(row.kv_budget),
        str(row.rows),
        f"{row.context:,}",
        f"{row.prefill_tps:,.0f}",
        f"{row.decode_tps:,.1f}",
        f"{row.ms_per_token_p50:.2f}",
        f"{row.ms_per_token_p95:.2f}",
        f"{row.ttft_s:.2f}",
        "-" if row.peak_bytes is None else format_size(row.peak_bytes),
    )


# Blue, orange, green and grey that stay apart for colour-blind readers; each line has its own marker too.
_LINES = {
    "full": ("#666666", "s"),
    "gates": ("#0072b2", "o"),
    "static": ("#56b4e9", "D"),
    "keydiff": ("#e69f00", "d"),
    "streaming": ("#d55e00", "^"),
    "protected": ("#cc79a7", "v"),
    "random": ("#009e73", "x"),
    "map-reduce": ("#000000", "*"),
}


def draw_accuracy(rows: Sequence[EvalResult], path: str) -> None:
    """Write one panel per task: a line per policy with its 95 % interval, the full cache as a level.

    Raises:
        UsageError: a file that cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(1 + 3.6 * len(tasks), 3.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        own = [row for row in rows if row.task == task]
        _draw_task(panel, own)
        scale = _Scale.of(own)
        panel.set(title=task, xlabel="slots per KV head (M)", ylabel=scale.name)
        if scale.name == "accuracy":
            panel.set_ylim(-0.03, 1.03)
        panel.grid(alpha=0.3)
    panels[-1].legend(frameon=False)
    form = Path(path).suffix.removeprefix(".").lower() or "png"
    with (
        mpl.rc_context({"svg.hashsalt": "trimkv"}),  # the same rows give the same file
        whole_file(Path(path), hint="check the path given to --plot") as partial,
    ):
        figure.savefig(partial, dpi=160, format=form, metadata={"Date": None} if form == "svg" else None)


def _draw_task(panel: Any, rows: Sequence[EvalResult]) -> None:
    budgets = sorted({row.kv_budget for row in rows if row.kv_budget is not None})
    for policy in dict.fromkeys([*EVERY_POLICY, *(row.policy for row in rows)]):
        own = sorted((row for row in rows if row.policy == policy), key=lambda row: row.kv_budget or 0)
        if not own:
            continue
        colour, marker = _LINES.get(policy, (None, "."))
        if policy == "full":
            panel.axhline(_height(own[0])[0], color=colour, linestyle="--", label="full cache")
            continue
        places = [budgets.index(row.kv_budget) for row in own if row.kv_budget is not None]
        heights = [_height(row) for row in own]
        means = [mean for mean, _, _ in heights]
        errors = ([mean - low for mean, low, _ in heights], [high - mean for mean, _, high in heights])
        panel.errorbar(places, means, yerr=errors, color=colour, marker=marker, capsize=3, label=policy, clip_on=False)
    panel.set_xticks(range(len(budgets)), [str(budget) for budget in budgets])


def _height(row: EvalResult) -> tuple[float, float, float]:
    """Return how good a row is and its interval, empty where it has none: the share of right answers, or perplexity."""
    value = row.nats if row.nats is not None else row.accuracy or 0.0
    low, high = row.ci95 or (value, value)
    if row.nats is None:
        return value, low, high
    return math.exp(value), math.exp(low), math.exp(high)
