"""One training step: the teacher's forward, the student's, three losses, and an update of the gates alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimkv_cli.errors import TrimkvError
from trimkv_cli.spec import ModelSpec
from trimkv_cli.train.attention import checkpoint_layers, hidden_states, install
from trimkv_cli.train.capacity import capacity_excess, place_weights
from trimkv_cli.train.losses import distill
from trimkv_cli.train.new_gates import gate_tensors
from trimkv_cli.train.options import Border, TrainOptions
from trimkv_cli.train.packing import PADDING, Batch
from trimkv_cli.train.training_pass import Reading, TrainingPass


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The parts of the loss, means over a step: KL and NTP per wanted token, capacity per token, layer and head.

    A capacity that has no weight is not computed, and None.
    """

    kl: float
    ntp: float
    capacity: float | None
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counts:
    """What a step's losses are divided by: all its micro-batches together, so that splitting it changes nothing."""

    wanted: int
    scored: int

    @classmethod
    def of(cls, batches: Sequence[Batch], heads: int) -> _Counts:
        return cls(
            wanted=max(1, sum(int(batch.wanted.sum()) for batch in batches)),
            scored=heads * sum(int((batch.documents != PADDING).sum()) for batch in batches),
        )


class Trainer:
    """Own the gates of a frozen model and the optimiser's state; see retention-gated distillation, arXiv 2512.03324.

    The gates stay in float32; with `autocast` the matrix products run in that dtype.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        gates: nn.ModuleList,
        spec: ModelSpec,
        options: TrainOptions,
        *,
        autocast: torch.dtype | None = None,
        recompute_layers: bool = False,
    ) -> None:
        self.model, self.gates, self.spec, self.options = model, gates, spec, options
        self.autocast = autocast
        self.parameters = gate_tensors(gates)
        self.optimizer = _optimizer(self.parameters, options)
        self.steps_done = 0
        model.requires_grad_(False)
        install(model, list(gates), spec.windows)
        if recompute_layers:
            checkpoint_layers(model)

    def step(self, batches: Sequence[Batch]) -> Losses:
        """Update the gates once, from the micro-batches of one step."""
        counts = _Counts.of(batches, self.spec.num_layers * self.spec.num_kv_heads)
        sums = torch.zeros(3, device=self.model.device)
        for forward, batch in enumerate(batches):
            parts = self.losses(batch, counts, border=self.options.border_at(self.steps_done, forward))
            loss = parts[0] + parts[1] + self.options.cap_weight * parts[2]
            if loss.requires_grad:  # a student with a slot for every token has nothing to learn
                loss.backward()  # type: ignore[no-untyped-call]
            sums += torch.stack(parts).detach()
        self._update()
        kl, ntp, capacity = sums.tolist()
        weight = self.options.cap_weight
        return Losses(kl=kl, ntp=ntp, capacity=capacity if weight else None, total=kl + ntp + weight * capacity)

    def losses(self, batch: Batch, counts: _Counts | None = None, *, border: Border | None = None) -> list[Tensor]:
        """Return KL, NTP and capacity of a micro-batch, its shares of a step's means.

        With a border the student is an evicting one, which computes nothing but what is asked for: its answers see
        what lies before the border of what the teacher has read. A capacity of weight 0 is not computed, and 0.
        """
        counts = counts or _Counts.of([batch], self.spec.num_layers * self.spec.num_kv_heads)
        kind = self.model.device.type
        asked, real = batch.asked()
        with torch.autocast(kind, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            read = self._read_fading(batch, asked) if border is None else self._read_evicting(batch, asked, border)
            teacher, student, now = read
            rows, columns = real.nonzero(as_tuple=True)[0], asked[real]
            kl, ntp = distill(
                student[real],
                teacher[rows, columns],
                batch.ids[rows, columns + 1],
                _head(self.model),
                vocab_size=self.spec.vocab_size,
            )
        return [kl / counts.wanted, ntp / counts.wanted, self._excess(batch, now) / counts.scored]

    def _read_fading(self, batch: Batch, asked: Tensor) -> tuple[Tensor, Tensor, TrainingPass]:
        """Return the teacher's states of all tokens, the student's of those `asked` for, and the student's pass."""
        teacher = self._teach(batch.make_pass(gated=False), batch)
        now = batch.make_pass(gated=True)
        student = hidden_states(self.model, batch.ids, now)
        return teacher, student.take_along_dim(asked[:, :, None], dim=1), now

    def _read_evicting(self, batch: Batch, asked: Tensor, border: Border) -> tuple[Tensor, Tensor, TrainingPass]:
        reading = Reading()
        teacher = self._teach(batch.make_pass(gated=False, reading=reading), batch)
        now = batch.make_pass(gated=True, border=border, reading=reading, columns=asked)
        return teacher, hidden_states(self.model, batch.ids, now), now

    @torch.no_grad()
    def _teach(self, now: TrainingPass, batch: Batch) -> Tensor:
        return hidden_states(self.model, batch.ids, now)

    def _excess(self, batch: Batch, now: TrainingPass) -> Tensor:
        if self.options.cap_weight == 0:
            return torch.zeros((), device=batch.ids.device)
        weights = place_weights(batch.documents)
        excess = [
            capacity_excess(
                now.log_betas[layer],
                now,
                weights,
                memory_size=self.options.memory_size,
                window=self.spec.windows[layer],
            )
            for layer in sorted(now.log_betas)
        ]
        return torch.stack(excess).sum()

    def _update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr_at(self.steps_done)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.options.clip)
        if not torch.isfinite(norm):
            raise TrimkvError(
                f"the gradient of step {self.steps_done + 1} is not finite", hint="try --dtype fp32, or a lower --lr"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps_done += 1


def _optimizer(parameters: dict[str, Tensor], options: TrainOptions) -> torch.optim.AdamW:
    """Make AdamW; only matrices decay, as is usual: a decaying bias would make every token fade."""
    groups = [
        {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.weight_decay)


def _head(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return what makes logits of the decoder's output; some families bound them."""
    head: Callable[[Tensor], Tensor] = model.get_output_embeddings()
    bound = getattr(model.config, "final_logit_softcapping", None)
    if bound is None:
        return head
    return lambda states: torch.tanh(head(states) / bound) * bound
