"""What one training run is: every value that changes the gates that come out of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import cos, pi
from typing import Any, Literal

from trimkv_cli.errors import UsageError

TrainedVariant = Literal["rg", "rg10"]
Schedule = Literal["constant", "cosine"]
Export = Literal["own", "released"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Describe the gates, the data's shape and the optimisation; defaults follow arXiv 2512.03324.

    `context` counts the tokens of a sequence. A sequence's position ids may have random gaps, strictly increasing, of
    `position_gap` positions at most together: the model, the retention bias and the capacity all see the distances.
    """

    memory_size: int
    context: int
    steps: int
    batch: int = 1
    accumulate: int = 4
    lr: float = 2e-4
    weight_decay: float = 0.01
    warmup: int = 0
    schedule: Schedule = "constant"
    clip: float = 1.0
    gate: TrainedVariant = "rg"
    hidden: int = 512
    bias_init: float = 8.0
    cap_weight: float = 1.0
    position_gap: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("memory_size", "steps", "batch", "accumulate", "hidden"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        _check("context", self.context, self.context >= 2, "2 or more")
        for name in ("weight_decay", "warmup", "cap_weight", "position_gap", "seed"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("lr", "clip"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "more than 0")

    @property
    def sequences_per_step(self) -> int:
        return self.batch * self.accumulate

    @property
    def positions(self) -> int:
        """Count the position ids that a sequence may reach."""
        return self.context + self.position_gap

    def lr_at(self, step: int) -> float:
        """Return the learning rate of step 0, 1, …"""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "constant":
            return self.lr * warm
        return self.lr * warm * (1 + cos(pi * min(1.0, step / self.steps))) / 2

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must share with its checkpoint: a constant rate may go on for more steps."""
        values = asdict(self)
        if self.schedule == "constant":
            del values["steps"]
        return values


def _check(name: str, value: float, fine: bool, range_: str) -> None:
    if not fine:
        raise UsageError(f"--{name.replace('_', '-')} is {value}", hint=f"it takes {range_}")
