"""One training step: the teacher's forward, the student's, three losses, and an update of the gates alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimkv_cli.cache.gates import build_gates, layer_shapes, tensor_key
from trimkv_cli.errors import TrimkvError
from trimkv_cli.model.spec import GateSpec, ModelSpec
from trimkv_cli.train.attention import checkpoint_layers, hidden_states, install
from trimkv_cli.train.attention_share import lost_attention
from trimkv_cli.train.losses import capacity_excess, distill, place_weights
from trimkv_cli.train.options import Border, TrainOptions
from trimkv_cli.train.packing import Batch
from trimkv_cli.train.teacher import Counts, TeacherBatch
from trimkv_cli.train.training_pass import TeacherStates, TrainingPass


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The parts of the loss, means over a step: KL and NTP per wanted token, capacity per token, layer and head.

    Attention is the mean of `−log share` per watched query, layer and head. What has no weight is not computed, and
    None.
    """

    kl: float | None
    ntp: float | None
    capacity: float | None
    total: float
    attention: float | None = None


class Trainer:
    """Own the gates of a frozen model and the optimiser's state; see retention-gated distillation, arXiv 2512.03324.

    The gates stay in float32; with `autocast` the matrix products run in that dtype. `teacher` is the same model in
    another dtype, which reads instead of it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        gates: nn.ModuleList,
        spec: ModelSpec,
        options: TrainOptions,
        *,
        autocast: torch.dtype | None = None,
        teacher: PreTrainedModel | None = None,
        recompute_layers: bool = False,
    ) -> None:
        self.model, self.gates, self.spec, self.options = model, gates, spec, options
        self.autocast = autocast
        self.teacher = teacher or model
        self.parameters = gate_tensors(gates)
        self.optimizer = _optimizer(self.parameters, options)
        self.steps_done = 0
        for each in {id(one): one for one in (model, self.teacher)}.values():
            each.requires_grad_(False)
            install(each, list(gates), spec.windows)
        if recompute_layers:
            checkpoint_layers(model)

    def step(self, batches: Iterable[TeacherBatch]) -> Losses:
        """Update the gates once, from the batches of one step, each forgotten before the next."""
        sums = sum(map(self._learn, batches, count()), torch.zeros(4, device=self.model.device))
        distills, (cap, watch) = self._distills, self._weights
        self._update()
        kl, ntp, capacity, attention = sums.tolist()
        return Losses(
            kl=kl if distills else None,
            ntp=ntp if distills else None,
            capacity=capacity if cap else None,
            attention=attention if watch else None,
            total=kl + ntp + cap * capacity + watch * attention,
        )

    @property
    def _distills(self) -> bool:
        return self.steps_done >= self.options.attention_steps

    @property
    def _weights(self) -> tuple[float, float]:
        """Return what this step's capacity and attention weigh."""
        cap = self.options.cap_weight if self._distills else 0.0
        return cap, self.options.attention_weight_at(self.steps_done)

    def _learn(self, taught: TeacherBatch, forward: int) -> Tensor:
        border, (cap, watch) = self.options.border_at(self.steps_done, forward), self._weights
        nothing = torch.zeros((), device=self.model.device)
        parts = self.losses(taught, border=border) if self._distills else [nothing] * 3
        parts.append(nothing if border is None or not watch else self._lost_attention(taught, border))
        loss = parts[0] + parts[1] + cap * parts[2] + watch * parts[3]
        if loss.requires_grad:  # a student with a slot for every token has nothing to learn
            loss.backward()  # type: ignore[no-untyped-call]
        return torch.stack(parts).detach()

    @torch.no_grad()
    def teach(self, batch: Batch, counts: Counts | None = None) -> TeacherBatch:
        """Have the model read a micro-batch without gates; any thread may, whatever `step` does meanwhile.

        The counts are its step's; without them it is a step of its own.
        """
        columns, watched = batch.watching() if self.options.reads_attention else (None, None)
        layers = TeacherStates(columns) if self.options.student == "evicting" else None
        asked, real = batch.asked()
        with self._precision():
            states = hidden_states(self.teacher, batch.ids, batch.make_pass(gated=False, teacher=layers))
        states = states.take_along_dim(asked[:, :, None], dim=1).to(self.model.dtype)
        counts = counts or Counts.of([batch])
        return TeacherBatch(
            batch=batch, counts=counts, asked=asked, real=real, states=states, layers=layers, watched=watched
        )

    def _lost_attention(self, taught: TeacherBatch, border: Border) -> Tensor:
        assert taught.layers is not None
        assert taught.watched is not None
        now = taught.batch.make_pass(gated=True, border=border, columns=taught.layers.columns)
        with self._precision():
            lost = lost_attention(taught.layers, list(self.gates), now, taught.watched, self.spec.windows)
        return lost / taught.counts.watched

    def losses(self, taught: TeacherBatch, *, border: Border | None = None) -> list[Tensor]:
        """Return KL, NTP and capacity of a micro-batch, its shares of a step's means.

        With a border the student is an evicting one, which computes nothing but what is asked for: its answers see
        what lies before the border of what the teacher has read. A capacity of weight 0 is not computed, and 0.
        """
        batch, counts, asked, real = taught.batch, taught.counts, taught.asked, taught.real
        columns = None if border is None else asked
        now = batch.make_pass(gated=True, border=border, teacher=taught.layers, columns=columns)
        with self._precision():
            student = hidden_states(self.model, batch.ids, now)
            if columns is None:
                student = student.take_along_dim(asked[:, :, None], dim=1)
            kl, ntp = distill(
                student[real],
                taught.states[real],
                batch.ids.take_along_dim(asked + 1, dim=1)[real],
                _head(self.model),
                vocab_size=self.spec.vocab_size,
            )
        heads = self.spec.num_layers * self.spec.num_kv_heads
        return [kl / counts.wanted, ntp / counts.wanted, self._excess(batch, now) / (heads * counts.real)]

    def _precision(self) -> torch.autocast:
        return torch.autocast(
            self.model.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None
        )

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


INIT_STD = 0.02


def describe_gates(options: TrainOptions, spec: ModelSpec, model_id: str) -> GateSpec:
    return GateSpec(
        variant=options.gate,
        id=model_id,
        hidden=options.hidden,
        memory_size=options.memory_size,
        largest_memory_size=options.largest_memory_size,
        trained_context=options.context,
        base_model=model_id,
        model_type=spec.model_type,
    )


def new_gates(
    gate: GateSpec, spec: ModelSpec, options: TrainOptions, *, hidden_act: str, device: torch.device
) -> nn.ModuleList:
    """Return gates in float32 that can learn: weights N(0, 0.02), biases 0, and `bias` as the options say."""
    shapes = layer_shapes(
        variant=gate.variant, input_size=spec.hidden_size, hidden=gate.hidden, num_kv_heads=spec.num_kv_heads
    )
    generator = torch.Generator().manual_seed(options.seed)
    tensors = {
        tensor_key(layer, name): _initial(name, shape, options.bias_init, generator)
        for layer in range(spec.num_layers)
        for name, shape in shapes.items()
    }
    gates = build_gates(gate, spec, tensors, dtype=torch.float32, device=device, hidden_act=hidden_act)
    return gates.requires_grad_(requires_grad=True)


def gate_tensors(gates: nn.ModuleList) -> dict[str, Tensor]:
    return {
        tensor_key(layer, name): parameter
        for layer, gate in enumerate(gates)
        for name, parameter in gate.named_parameters()
    }


def _initial(name: str, shape: tuple[int, ...], bias_init: float, generator: torch.Generator) -> Tensor:
    if name == "bias":
        return torch.full(shape, bias_init)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator) * INIT_STD
