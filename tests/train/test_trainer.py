"""Training steps: what learns, what does not, and what must not change the result."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from helpers.tiny_training import make_batch, make_trainer
from trimkv_cli.train.packing import Batch
from trimkv_cli.train.teacher import Counts, TeacherBatch

TinyModel = Callable[..., Any]
FAMILIES = ["qwen3", "qwen2", "llama", "mistral", "phi3", "gemma3"]


def gradients(trainer: Any, batch: Any) -> dict[str, torch.Tensor]:
    sum(trainer.losses(trainer.teach(batch))).backward()
    return {name: parameter.grad.clone() for name, parameter in trainer.parameters.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gate", ["rg", "rg10"])
def test_only_gates_learn(tiny_model: TinyModel, family: str, gate: str) -> None:
    """Catches a gate without a gradient (a layer that is not hooked), and a model that changes."""
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(model, gate=gate)
    batch = make_batch()
    assert all(gradient.abs().max() > 0 for gradient in gradients(trainer, batch).values())
    assert all(parameter.grad is None for parameter in model.parameters())
    trainer.step([trainer.teach(batch)])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gemma3"])
def test_recomputed_layers_give_the_same_gradients(tiny_model: TinyModel, family: str) -> None:
    """Catches a capacity loss that loses its gradient when layers are computed twice."""
    batch = make_batch()
    kept = gradients(make_trainer(tiny_model(family)), batch)
    again = gradients(make_trainer(tiny_model(family), recompute_layers=True), batch)
    torch.testing.assert_close(kept, again)


def test_accumulation_changes_nothing(tiny_model: TinyModel) -> None:
    """Catches means of means: two forwards of a row must weigh like one of two rows."""
    batch = make_batch()
    halves = [Batch(*(field[row : row + 1] for field in batch[:5])) for row in range(2)]
    whole, split = (make_trainer(tiny_model("qwen3"), clip=1e9) for _ in range(2))
    counts = Counts.of(halves)
    first, second = whole.step([whole.teach(batch)]), split.step(split.teach(half, counts) for half in halves)
    assert first.total == pytest.approx(second.total, rel=1e-5)
    torch.testing.assert_close(whole.parameters, split.parameters, rtol=1e-3, atol=1e-4)


def test_no_lesson_outlives_its_turn(tiny_model: TinyModel) -> None:
    """Catches memory for what the teacher has read of two micro-batches at a time."""
    trainer = make_trainer(tiny_model("qwen3"))
    before: list[weakref.ref[torch.Tensor]] = []

    def teach() -> Iterator[TeacherBatch]:
        for seed in range(3):
            assert all(states() is None for states in before)
            batch = trainer.teach(make_batch(seed=seed))
            before.append(weakref.ref(batch.states))
            yield batch
            del batch

    trainer.step(teach())
    assert len(before) == 3


def test_training_lowers_the_loss(tiny_model: TinyModel) -> None:
    """Catches a wrong sign, and losses that do not reach the gates."""
    trainer = make_trainer(tiny_model("qwen3"), memory_size=3, bias_init=6.0, lr=3e-2)
    batch = make_batch(rows=4)
    losses = [trainer.step([trainer.teach(batch)]) for _ in range(25)]
    assert losses[-1].capacity < losses[0].capacity * 0.6
    assert losses[-1].total < losses[0].total - 0.1


@pytest.mark.parametrize("student", ["fading", "evicting"])
def test_a_teacher_in_bf16_is_near(tiny_model: TinyModel, student: Any) -> None:
    """Catches states of the teacher's dtype that reach the student's products."""
    options = {"student": student, "attention_weight": float(student == "evicting")}
    exact, near = (
        make_trainer(tiny_model("qwen3"), teacher=teacher, **options)
        for teacher in (None, tiny_model("qwen3").to(torch.bfloat16))
    )
    losses = [trainer.step([trainer.teach(make_batch())]).total for trainer in (exact, near)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


def test_bf16_autocast_is_near(tiny_model: TinyModel) -> None:
    """Catches gates or capacity in a dtype that loses them."""
    batch = make_batch()
    trainer = make_trainer(tiny_model("qwen3"))
    exact = [part.item() for part in trainer.losses(trainer.teach(batch))]
    trainer.autocast = torch.bfloat16
    parts = trainer.losses(trainer.teach(batch))
    assert [part.item() for part in parts] == pytest.approx(exact, rel=0.1, abs=0.02)
    sum(parts).backward()  # type: ignore[union-attr]
    assert all(parameter.grad.dtype == torch.float32 for parameter in trainer.parameters.values())
