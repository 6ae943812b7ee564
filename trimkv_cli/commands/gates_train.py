"""`trimkv gates train`: make retention gates for a model by distillation from itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimkv_cli.commands.options import Offline, Quiet, Revision, option
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.streams import Every, Interrupts
from trimkv_cli.train.options import Export, Schedule, Student, TrainedVariant, TrainOptions
from trimkv_cli.ui.plain import neutralise, print_note, print_warning

if TYPE_CHECKING:
    from trimkv_cli.train.run import StepReport

LOG_EVERY_S = 10.0
_GATES, _DATA, _LEARNING, _RUN = "Gates", "Data", "Learning", "Run"


def _own(
    flag: str, panel: str, help: str, metavar: str | None = "N", *, short: str | None = None, min: int | None = None
) -> Any:
    return typer.Option(*filter(None, (short, flag)), help=help, rich_help_panel=panel, metavar=metavar, min=min)


def train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Profile name, hub id or folder.")],
    *,
    data: Annotated[list[Path], _own("--data", _DATA, "JSONL or text file; may be given several times.", "FILE")],
    output: Annotated[Path, _own("--output", _RUN, "Folder for the gates and the checkpoint.", "DIR", short="-o")],
    memory_size: Annotated[int, _own("--memory-size", _GATES, "Slots per KV head to train for.", "M")],
    sequence: Annotated[int, _own("--context", _DATA, "Tokens of a sequence.", short="-c")],
    steps: Annotated[int, _own("--steps", _LEARNING, "Updates of the gates.")],
    gate: Annotated[TrainedVariant, _own("--gate", _GATES, "rg: two linear layers; rg10: three.", None)] = "rg",
    hidden: Annotated[int, _own("--hidden", _GATES, "Width of a gate.")] = 512,
    bias_init: Annotated[float, _own("--bias-init", _GATES, "Where gates start: higher forgets later.", "X")] = 8.0,
    position_gap: Annotated[
        int, _own("--position-gap", _DATA, "Let a document's positions jump, by N together at most.")
    ] = 0,
    batch: Annotated[int, _own("--batch", _LEARNING, "Sequences of a forward.")] = 1,
    accumulate: Annotated[int, _own("--accumulate", _LEARNING, "Forwards of an update.")] = 4,
    lr: Annotated[float, _own("--lr", _LEARNING, "Learning rate.", "X")] = 2e-4,
    schedule: Annotated[
        Schedule, _own("--schedule", _LEARNING, "How the rate goes on after warm-up.", None)
    ] = "constant",
    warmup: Annotated[int, _own("--warmup", _LEARNING, "Updates over which the rate rises.")] = 0,
    weight_decay: Annotated[float, _own("--weight-decay", _LEARNING, "Weight decay of AdamW.", "X")] = 0.01,
    clip: Annotated[float, _own("--clip", _LEARNING, "Largest norm of a gradient.", "X")] = 1.0,
    student: Annotated[
        Student,
        _own("--student", _LEARNING, "fading: tokens fade, as in the paper; evicting: answers see what is kept.", None),
    ] = "fading",
    cap_weight: Annotated[
        float | None,
        _own("--cap-weight", _LEARNING, "Weight of the capacity loss; default: 1 fading, 0 evicting.", "X"),
    ] = None,
    seed: Annotated[int, _own("--seed", _LEARNING, "Fixes first weights, order and gaps.")] = 0,
    resume: Annotated[
        bool, _own("--resume/--overwrite", _RUN, "Go on from a checkpoint in DIR, or start anew.", None)
    ] = True,
    save_every: Annotated[int, _own("--save-every", _RUN, "Updates between checkpoints.", min=1)] = 100,
    log_every: Annotated[int | None, _own("--log-every", _RUN, "Updates between lines; default: 10 s.", min=1)] = None,
    export: Annotated[
        Export, _own("--export", _RUN, "own, or released: the format of the authors' folders.", None)
    ] = "own",
    gradient_checkpointing: Annotated[
        bool,
        _own(
            "--gradient-checkpointing/--no-gradient-checkpointing", _RUN, "Compute layers twice to save memory.", None
        ),
    ] = False,
    dtype: Annotated[
        str,
        _own(
            "--dtype",
            "Model",
            "auto, bf16 (autocast) or fp32. auto on a CPU is bf16 where it has tiles for it.",
            "TYPE",
        ),
    ] = "auto",
    device: Annotated[str, option("device")] = "auto",
    threads: Annotated[int | None, option("threads")] = None,
    revision: Revision = None,
    offline: Offline = False,
    trust_remote_code: Annotated[bool, option("trust_remote_code")] = False,
    quiet: Quiet = False,
) -> None:
    """Train retention gates for a model; the model stays as it is, and its own answers are what the gates learn from.

    trimkv gates train Qwen/Qwen3-0.6B --data chats.jsonl -o gates --memory-size 256 --context 4096 --steps 1000

    A line of a *.jsonl file is {"messages": [...]}, of which the assistant's are learnt, or {"text": "..."}; other
    files are one text each. Documents longer than --context are cut into pieces, and counted. Stopped at any moment,
    the same command goes on from its last checkpoint. Prints the folder.
    """
    options = TrainOptions(
        memory_size=memory_size,
        context=sequence,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        lr=lr,
        weight_decay=weight_decay,
        warmup=warmup,
        schedule=schedule,
        clip=clip,
        gate=gate,
        hidden=hidden,
        bias_init=bias_init,
        student=student,
        cap_weight=cap_weight if cap_weight is not None else 1.0 if student == "fading" else 0.0,
        position_gap=position_gap,
        seed=seed,
    )
    engine = EngineOptions(
        model=model,
        revision=revision,
        gates="none",
        dtype=dtype,
        device=device,
        offline=offline,
        trust_remote_code=trust_remote_code,
        threads=threads,
    )
    from trimkv_cli.train.run import Listener, RunOptions, train_gates

    run = RunOptions(
        data=tuple(data),
        output=output,
        export=export,
        overwrite=not resume,
        save_every=save_every,
        recompute_layers=gradient_checkpointing,
    )
    progress = _Progress(log_every=log_every, quiet=quiet)
    with Interrupts() as interrupts:
        listener = Listener(note=progress.note, step=progress.step, should_stop=interrupts.noted)
        train_gates(engine, options, run, listener)
    print(neutralise(str(output)))


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
    capacity = "" if losses.capacity is None else f"  capacity {losses.capacity:.4f}"
    return (
        f"step {report.step}/{report.steps}  loss {losses.total:.4f}  kl {losses.kl:.4f}  ntp {losses.ntp:.4f}"
        f"{capacity}  lr {report.lr:.1e}  {report.tokens / report.elapsed_s:,.0f} tok/s  "
        f"left {int(left) // 60}:{int(left) % 60:02d}"
    )
