"""`trimkv gates train`: retention gates for a model by distillation from itself."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from trimkv_cli.commands.options import QUIET
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.settings import option
from trimkv_cli.streams import Every, Interrupts
from trimkv_cli.train.options import RunFiles, TrainOptions
from trimkv_cli.ui.plain import neutralise, print_note, print_warning

if TYPE_CHECKING:
    from trimkv_cli.train.run import StepReport

LOG_EVERY_S = 10.0


def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Profile name, hub id, folder or GGUF file.")],
    *,
    run: RunFiles,
    options: TrainOptions,
    dtype: str = option(
        "auto",
        "auto, bf16 (autocast) or fp32. auto on a CPU is bf16 where it has tiles for it.",
        "TYPE",
        panel="Model",
        setting=True,
    ),
    engine: Annotated[EngineOptions, "device", "threads", "revision", "offline", "trust_remote_code"],
    quiet: bool = QUIET,
) -> None:
    """Train retention gates for a model; the model stays as it is, and its own answers are what the gates learn from.

    trimkv gates train Qwen/Qwen3-0.6B --data chats.jsonl -o gates --memory-size 256 --context 4096 --steps 1000

    A line of a *.jsonl file is {"messages": [...]}, of which the assistant's are learnt, or {"text": "..."}; other
    files are one text each. Documents longer than --context are cut into pieces, and counted. Stopped at any moment,
    the same command goes on from its last checkpoint. Prints the folder.
    """
    from trimkv_cli.train.run import Listener, train_gates

    engine = replace(engine, model=model, gates="none", dtype=dtype)
    progress = _Progress(log_every=run.log_every, quiet=quiet)
    with Interrupts() as interrupts:
        listener = Listener(note=progress.note, step=progress.step, should_stop=interrupts.noted)
        train_gates(engine, options, run, listener)
    print(neutralise(str(run.output)))


class _Progress:
    """Print one plain line on stderr for the first step, the last, and at intervals between."""

    def __init__(self, *, log_every: int | None, quiet: bool) -> None:
        self._every, self._quiet = log_every, quiet
        self._clock = Every(LOG_EVERY_S, at_once=True)
        self._shown: dict[str, int] = {}  # counts of what was warned of, as last shown
        self._before: int | None = None  # steps done before this process

    def note(self, text: str) -> None:
        if not self._quiet:
            print_note(text)

    def step(self, report: StepReport) -> None:
        self._warn_of_data(report)
        self._before = report.step - 1 if self._before is None else self._before
        if self._quiet or not self._due(report):
            return
        print_note(_line(report, done=report.step - self._before))

    def _due(self, report: StepReport) -> bool:
        if self._every is not None:
            return report.step % self._every == 0 or report.step == report.steps
        return self._clock.due() or report.step == report.steps

    def _warn_of_data(self, report: StepReport) -> None:
        """Say, at the first one and at the end, how many documents were cut and how many sequences taught nothing."""
        cursor, last = report.cursor, report.step == report.steps
        if self._news("cut", cursor.cut_documents, last=last):
            were = "documents were" if last else "documents so far were"
            print_warning(
                f"{cursor.cut_documents:,} {were} longer than --context and cut into {cursor.cut_pieces:,} pieces"
            )
        if self._news("unasked", cursor.unasked_sequences, last=last):
            so_far = "" if last else " so far"
            print_warning(
                f"{cursor.unasked_sequences:,} of {cursor.sequences:,} sequences{so_far} had no answer in them "
                "and taught nothing: answers come later than --context reaches?"
            )

    def _news(self, name: str, count: int, *, last: bool) -> bool:
        """Say whether a count is to be shown, the first time or at the end; what was shown last is not shown again."""
        shown = self._shown.get(name, 0)
        if count <= shown or (shown and not last):
            return False
        self._shown[name] = count
        return True


def _line(report: StepReport, *, done: int) -> str:
    losses = report.losses
    left = report.elapsed_s / done * (report.steps - report.step)
    parts = {name: getattr(losses, name) for name in ("kl", "ntp", "capacity", "attention")}
    shown = "".join(f"  {name} {value:.4f}" for name, value in parts.items() if value is not None)
    return (
        f"step {report.step}/{report.steps}  loss {losses.total:.4f}{shown}"
        f"  lr {report.lr:.1e}  {report.tokens / report.elapsed_s:,.0f} tok/s  "
        f"left {int(left) // 60}:{int(left) % 60:02d}"
    )
