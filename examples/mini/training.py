"""The training loop of the built-in model: an adaptive curriculum over lengths, with checkpoints."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from examples.mini.rows import (
    ANSWER_WEIGHT,
    EARLY,
    LAST,
    LATE,
    LISTS,
    PAIRS,
    THINGS,
    Batch,
    Encoder,
    Mixture,
    make_batch,
)
from trimkv_cli.engine.devices import multiplies_bf16, prepare_training
from trimkv_cli.files import whole_file

PARTS = 2  # of a step, each with rows of its own, so that one process and two see the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What the recipe trains with; the run ends when `tokens` or `cpu_minutes`, of all processes, are used up.

    The learning rate is level, cools down in the last `cooldown` of the first `first_spell` of the run, and rises once
    more, to `second_rate` of what it was: what is learnt last, where a list ends, is learnt as the rate falls.
    """

    seed: int = 2512
    tokens: int = 24_000_000
    cpu_minutes: float = 91.0
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    tokens_per_step: int = 4096
    rows_per_step: int = 16
    pass_accuracy: float = 0.975
    pairs_accuracy: float = 0.96  # about so many things, before there are half as many again
    stage_tokens: int = 2_500_000
    learning_rate: float = 2e-3
    matrix_learning_rate: float = 4e-3
    weight_decay: float = 0.01
    warmup_steps: int = 60
    first_spell: float = 83 / 91
    cooldown: float = 0.35  # of the first spell
    second_rate: float = 0.4
    last_from: float = 0.4  # of the first spell, where the mixture turns to what is hardest
    max_positions: int = 65_536
    checkpoint_s: float = 120.0
    log_steps: int = 25


@dataclass(slots=True)
class Progress:
    """How far a run has come; `accuracy` is the running accuracy on answer tokens at the present length."""

    step: int = 0
    tokens: int = 0
    cpu_s: float = 0.0
    stage: int = 0
    stage_steps: int = 0
    stage_tokens: int = 0
    accuracy: float = 0.0
    things: int | None = 2  # that pairs are about, in the first stage
    loss: float = 0.0

    def done(self, schedule: Schedule) -> float:
        """Return the share of the run that lies behind, 0 to 1."""
        return max(self.tokens / schedule.tokens, self.cpu_s / (60 * schedule.cpu_minutes))


Report = Callable[[dict[str, Any]], None]


class Trainer:
    """Owns the model under training, its optimizers and its progress.

    Muon turns the matrices inside the layers; AdamW does the embedding and the norms.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        encoder: Encoder,
        schedule: Schedule,
        *,
        report: Report,
        team: Team | None = None,
    ) -> None:
        self.model, self.encoder, self.schedule, self.report = model, encoder, schedule, report
        self.team = team or Team()
        self.progress = Progress()
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        rest = [p for name, p in named if p.ndim != 2 or "embed" in name]
        self.optimizers = (
            torch.optim.Muon(matrices, weight_decay=schedule.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.98)),
        )

    def run(self, checkpoint: Path) -> None:
        """Train to the end of the schedule, from `checkpoint` where it exists."""
        if checkpoint.exists():
            self._load(checkpoint)
        saved_s = time.monotonic()
        self.model.train()
        while self.progress.done(self.schedule) < 1:
            self._step()
            if self.progress.step % self.schedule.log_steps == 0:
                self._report(self._line())
            if time.monotonic() - saved_s > self.schedule.checkpoint_s:
                saved_s = time.monotonic()
                self._save(checkpoint)
        self._save(checkpoint)

    def _step(self) -> None:
        progress, schedule = self.progress, self.schedule
        started_s = time.process_time()
        length = self._length(Random(f"{schedule.seed} {progress.step}"))
        rows = max(PARTS, min(schedule.rows_per_step, schedule.tokens_per_step // length))
        sums = torch.zeros(5, dtype=torch.float64)
        for part in range(self.team.rank, PARTS, self.team.size):
            sums[:3] += self._learn(Random(f"{schedule.seed} {progress.step} {part}"), rows // PARTS, length)
            sums[3] += rows // PARTS * length
        self._update(sums, started_s)
        loss, right, answers, tokens, cpu_s = sums.tolist()
        progress.step += 1
        progress.tokens += int(tokens)
        progress.cpu_s += cpu_s
        progress.stage_tokens += int(tokens)
        progress.loss = loss / PARTS
        if length == schedule.lengths[progress.stage]:
            self._grade(right / max(1, answers))

    def _learn(self, rng: Random, rows: int, length: int) -> Tensor:
        """Add a part's share of the gradient; return its loss, its right answer tokens and all of them."""
        batch = make_batch(
            self.encoder,
            rng,
            rows=rows,
            length=length,
            max_positions=self.schedule.max_positions,
            mixture=self._mixture,
        )
        loss, right, answers = weighted_loss(self.model, batch)
        (loss / PARTS).backward()  # type: ignore[no-untyped-call]
        return torch.tensor([loss.item(), right, answers])

    def _update(self, sums: Tensor, started_s: float) -> None:
        """Turn the parameters by what all processes found, and add up what they counted."""
        self.team.add(p.grad for p in self.model.parameters() if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rates = (self.schedule.matrix_learning_rate, self.schedule.learning_rate)
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * self._warmth()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        sums[4] = time.process_time() - started_s
        self.team.add([sums])

    def _grade(self, accuracy: float) -> None:
        """Move on to the next length once the present one is mastered, or has had its share."""
        progress, schedule = self.progress, self.schedule
        progress.stage_steps += 1
        weight = max(0.05, 1 / progress.stage_steps)
        progress.accuracy += weight * (accuracy - progress.accuracy)
        wanted = schedule.pass_accuracy if progress.stage else schedule.pairs_accuracy
        mastered = progress.stage_steps >= 20 and progress.accuracy >= wanted
        used_up = progress.stage_tokens >= schedule.stage_tokens
        if mastered and not used_up and progress.stage == 0 and progress.things:
            progress.things = _more(progress.things)
            progress.stage_steps, progress.accuracy = 0, 0.0
        elif (mastered or used_up) and not self._last_stage:
            self._report({**self._line(), "mastered": schedule.lengths[progress.stage] if mastered else None})
            progress.stage += 1
            progress.stage_steps, progress.stage_tokens, progress.accuracy = 0, 0, 0.0

    def _length(self, rng: Random) -> int:
        """Draw the length of a step: mostly the present one, sometimes an earlier one; in the end more of all.

        The first length is that of pairs, which later ones do not come back to.
        """
        lengths = self.schedule.lengths[min(1, self.progress.stage) : self.progress.stage + 1]
        return lengths[-1] if rng.random() < (0.4 if self._last_stage else 0.8) else rng.choice(lengths)

    @property
    def _mixture(self) -> Mixture:
        if self.progress.stage == 0:
            return replace(PAIRS, things=self.progress.things)
        if not self._last_stage:
            return EARLY
        done = self._spell()
        return LATE if done < self.schedule.last_from else LAST if done < 1 else LISTS

    @property
    def _last_stage(self) -> bool:
        return self.progress.stage + 1 == len(self.schedule.lengths)

    def _spell(self) -> float:
        """Return the share of the first spell that lies behind, or 1 and the share of the second."""
        done, first = self.progress.done(self.schedule), self.schedule.first_spell
        return done / first if done < first else 1 + (done - first) / (1 - first)

    def _warmth(self) -> float:
        """Return the factor on the learning rate: warm-up, plateau, cosine to zero; then from `second_rate` again."""
        schedule, done = self.schedule, self._spell()
        left = (1 - done) / schedule.cooldown if done < 1 else 2 - done
        rate = 1.0 if done < 1 else schedule.second_rate * min(1.0, (done - 1) / 0.05)
        cooled = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left))
        return max(0.01, rate * cooled) * min(1.0, (self.progress.step + 1) / schedule.warmup_steps)

    def _report(self, line: dict[str, Any]) -> None:
        if self.team.rank == 0:
            self.report(line)

    def _line(self) -> dict[str, Any]:
        progress = self.progress
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "cpu_s": round(progress.cpu_s, 1),
            "length": self.schedule.lengths[progress.stage],
            "things": progress.things,
            "accuracy": round(progress.accuracy, 4),
            "loss": round(progress.loss, 4),
            "tokens_per_cpu_s": round(progress.tokens / max(progress.cpu_s, 1e-9)),
        }

    def _save(self, path: Path) -> None:
        if self.team.rank != 0:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(self.progress),
            "schedule": json.dumps(asdict(self.schedule)),
        }
        with whole_file(path) as partial:
            torch.save(state, partial)

    def _load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])


def _more(things: int) -> int | None:
    """Return half as many again; after all there are, None, for values of any kind."""
    return min(len(THINGS), things + (things + 1) // 2) if things < len(THINGS) else None


def weighted_loss(model: torch.nn.Module, batch: Batch) -> tuple[Tensor, int, int]:
    """Return the weighted next-token loss, the answer tokens that are right, and all answer tokens."""
    with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16()):
        logits = predict(model, batch.ids, batch.positions)[:, :-1].float()
    targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    answers = weights == ANSWER_WEIGHT
    right = (logits.argmax(-1) == targets) & answers
    return (losses * weights.flatten()).sum() / weights.sum(), int(right.sum()), int(answers.sum())


def predict(model: torch.nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    """Return the logits `[B, T, V]` of whole rows.

    The mask of ones tells transformers that a jump in the positions is no border between packed sequences.
    """
    logits: Tensor = model(
        input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False
    ).logits
    return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """One process's place among `size`; alone it needs nobody."""

    rank: int = 0
    size: int = 1

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes."""
        if self.size == 1:
            return
        together = list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in together])
        distributed.all_reduce(flat)
        for tensor, part in zip(together, torch.split(flat, [tensor.numel() for tensor in together]), strict=True):
            tensor.copy_(part.view_as(tensor))


Work = Callable[[Team], None]


def work_together(size: int, work: Work) -> None:
    """Run `work` in `size` processes of one thread each, which end with this one; `work` must be picklable."""
    if size == 1:
        prepare_training(1)
        work(Team())
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        spawn(_join, args=(size, meeting, work), nprocs=size)  # type: ignore[no-untyped-call]


def _join(rank: int, size: int, meeting: str, work: Work) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare_training(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    try:
        work(Team(rank=rank, size=size))
    finally:
        distributed.destroy_process_group()


def _end_with_parent() -> None:
    """End this process once its parent is gone, however that went: nobody would stop it any more.

    torch asks for a SIGINT then, on Linux; a process that a shell started in the background ignores it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
