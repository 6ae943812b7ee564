"""Options of a training run: all that changes the gates which come out of it, and its files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from math import cos, pi
from pathlib import Path
from random import Random
from typing import Any, Literal

from trimkv_cli.errors import UsageError
from trimkv_cli.settings import option

TrainedVariant = Literal["rg", "rg10"]
Schedule = Literal["constant", "cosine"]
Student = Literal["fading", "evicting"]
Export = Literal["own", "bf16", "released"]
_gates, _data, _learning, _run = (partial(option, panel=name) for name in ("Gates", "Data", "Learning", "Run"))
_OF_ATTENTION = ("attention_steps", "attention_weight")
MOST_DOUBLINGS = 2  # of the slots that an evicting student is made for
# A token whose log score is 1 below the border is seen with a factor of e⁻³ at first, of e⁻³⁰ in the end: a head that
# looks for one token finds it through a softer border, and would not learn that a cache has lost it.
SOFTEST, SHARPEST = 3.0, 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Border:
    """What separates the tokens that an evicting student sees from the others: after how many, and how sharply."""

    slots: int
    sharpness: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Describe the gates, the data's shape and the optimisation; defaults follow arXiv 2512.03324.

    `context` counts the tokens of a sequence. A sequence's position ids may have random gaps, strictly increasing, of
    `position_gap` positions at most together: the model, the retention bias and the capacity all see the distances.
    The student sees all tokens, each as far as it has not faded (the paper's), or its answers see only those that a
    number of slots would hold. A `cap_weight` of None is 1 for the first, 0 for the second.

    An evicting student can begin with `attention_steps` updates in which nothing runs but the model itself: the gates
    of each layer learn to keep what its queries attend to, which costs half of a step and needs fewer of them.
    """

    memory_size: int = _gates(..., "Slots per KV head to train for.", "M")
    context: int = _data(..., "Tokens of a sequence.", "N", short="-c")
    steps: int = _learning(..., "Updates of the gates.", "N")
    gate: TrainedVariant = _gates("rg", "rg: two linear layers; rg10: three.")
    hidden: int = _gates(512, "Width of a gate.", "N")
    bias_init: float = _gates(8.0, "Where gates start: higher forgets later.", "X")
    position_gap: int = _data(0, "Let a document's positions jump, by N together at most.", "N")
    batch: int = _learning(1, "Sequences of a forward.", "N")
    accumulate: int = _learning(4, "Forwards of an update.", "N")
    lr: float = _learning(2e-4, "Learning rate.", "X")
    schedule: Schedule = _learning("constant", "How the rate goes on after warm-up.")
    warmup: int = _learning(0, "Updates over which the rate rises.", "N")
    weight_decay: float = _learning(0.01, "Weight decay of AdamW.", "X")
    clip: float = _learning(1.0, "Largest norm of a gradient.", "X")
    student: Student = _learning("fading", "fading: tokens fade, as in the paper; evicting: answers see what is kept.")
    attention_steps: int = _learning(0, "Updates at first that learn from the model's own attention alone.", "N")
    attention_weight: float = _learning(0.0, "Weight of that loss afterwards; evicting only.", "X")
    cap_weight: float = _learning(None, "Weight of the capacity loss; default: 1 fading, 0 evicting.", "X")
    begin_with: str | None = _learning(None, "Gate folder to begin with, for more data or other data.", "DIR")
    seed: int = _learning(0, "Fixes first weights, order and gaps.", "N", setting=True)

    def __post_init__(self) -> None:
        if self.cap_weight is None:
            object.__setattr__(self, "cap_weight", 1.0 if self.student == "fading" else 0.0)
        for name in ("memory_size", "steps", "batch", "accumulate", "hidden"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        _check("context", self.context, self.context >= 2, "2 or more")
        for name in ("weight_decay", "warmup", "cap_weight", "position_gap", "seed", *_OF_ATTENTION):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("lr", "clip"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "more than 0")
        if self.student == "fading" and self.reads_attention:
            raise UsageError("a fading student does not learn from attention", hint="--student evicting")

    @property
    def reads_attention(self) -> bool:
        """Whether the gates learn, at some time, from how the model attends."""
        return self.attention_steps > 0 or self.attention_weight > 0

    def attention_weight_at(self, step: int) -> float:
        return 1.0 if step < self.attention_steps else self.attention_weight

    @property
    def largest_memory_size(self) -> int | None:
        """Return the most slots that an evicting student may have; a fading one counts on `memory_size` alone."""
        return self.memory_size * 2**MOST_DOUBLINGS if self.student == "evicting" else None

    @property
    def sequences_per_step(self) -> int:
        return self.batch * self.accumulate

    @property
    def positions(self) -> int:
        """Count the position ids that a sequence may reach."""
        return self.context + self.position_gap

    def lr_at(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "constant":
            return self.lr * warm
        return self.lr * warm * (1 + cos(pi * min(1.0, step / self.steps))) / 2

    def border_at(self, step: int, forward: int) -> Border | None:
        """Draw the border of an evicting student: half of `memory_size` slots to four times as many, evenly in log.

        So the gates learn an order that holds at any budget around the one they are made for. The border sharpens over
        the run: at first tokens far below it are seen enough to learn from.
        """
        if self.student == "fading":
            return None
        slots = self.memory_size * 2 ** Random(f"{self.seed} {step} {forward}").uniform(-1, MOST_DOUBLINGS)  # noqa: S311
        return Border(slots=round(slots), sharpness=SOFTEST * (SHARPEST / SOFTEST) ** min(1.0, step / self.steps))

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must share with its checkpoint; its steps only where something hangs on them."""
        values = asdict(self)
        if self.schedule == "constant" and self.student == "fading":
            del values["steps"]
        if self.student == "evicting":
            values["border_sharpness"] = [SOFTEST, SHARPEST]
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """Where a run reads and writes, and how; nothing here changes what comes out, but for rounding."""

    data: list[Path] = option(..., "JSONL or text file; may be given several times.", "FILE", panel="Data")
    output: Path = _run(..., "Folder for the gates and the checkpoint.", "DIR", short="-o")
    resume: bool = _run(True, "Go on from a checkpoint in DIR, or start anew.", flag="--resume/--overwrite")
    save_every: int = _run(100, "Updates between checkpoints.", "N", least=1)
    log_every: int | None = _run(None, "Updates between lines; default: 10 s.", "N", least=1)
    export: Export = _run("own", "own; bf16: own in half the bytes; released: the format of the authors' folders.")
    gradient_checkpointing: bool = _run(False, "Compute layers twice to save memory.")


def _check(name: str, value: float, fine: bool, range_: str) -> None:
    if not fine:
        raise UsageError(f"--{name.replace('_', '-')} is {value}", hint=f"it takes {range_}")
