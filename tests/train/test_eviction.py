"""The student that sees what slots would hold: against the teacher, and against a cache written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.tiny_training import attend_one_by_one, make_batch, make_trainer
from trimkv_cli.train import eviction
from trimkv_cli.train.attention import hidden_states
from trimkv_cli.train.eviction import attend_to_kept
from trimkv_cli.train.options import SOFTEST, Border, TrainOptions
from trimkv_cli.train.training_pass import TeacherStates, TrainingPass

TinyModel = Callable[..., Any]
SHARP = 1e6


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3"])
def test_with_a_slot_for_every_token_the_student_is_the_teacher(tiny_model: TinyModel, family: str) -> None:
    """Catches a mask, window, scale or head that only one of the two attentions has."""
    trainer = make_trainer(tiny_model(family))
    batch = make_batch(length=40)
    asked, real = batch.asked()
    left, border = TeacherStates(), Border(slots=40, sharpness=1)
    with torch.no_grad():
        teacher = hidden_states(trainer.model, batch.ids, batch.make_pass(gated=False, teacher=left))
        now = batch.make_pass(gated=True, border=border, teacher=left, columns=asked)
        student = hidden_states(trainer.model, batch.ids, now)
    assert 0 < asked.shape[1] < 40
    torch.testing.assert_close(student[real], teacher.take_along_dim(asked[:, :, None], 1)[real], rtol=1e-4, atol=1e-5)


def test_the_tokens_before_wanted_ones_are_asked() -> None:
    """Catches a shift by one, rows of unequal counts, and a row that nothing is wanted of."""
    batch = make_batch(rows=3, length=12)
    batch.wanted[:] = torch.zeros(3, 12)
    batch.wanted[0, [3, 4, 11]] = True
    batch.wanted[1, 7] = True
    asked, real = batch.asked()
    assert [row[mask].tolist() for row, mask in zip(asked, real, strict=True)] == [[2, 3, 10], [6], []]
    assert asked.shape == (3, 3)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("block", "kept"), [(256, 1 << 24), (5, 0)])
def test_a_sharp_border_keeps_the_best_scores(
    monkeypatch: pytest.MonkeyPatch, block: int, kept: int, window: int | None
) -> None:
    """Catches another order than the cache's, tokens of other documents among the best, and blocks that differ."""
    monkeypatch.setattr(eviction, "QUERY_BLOCK", block)
    monkeypatch.setattr(eviction, "KEPT_NUMEL", kept)
    torch.manual_seed(0)
    now = make_batch(length=23).make_pass(gated=True, border=Border(slots=4, sharpness=SHARP))
    query, key, value = (torch.randn(2, heads, 23, 8) for heads in (6, 2, 2))
    log_beta = -torch.rand(2, 2, 23)

    def keep_best(row: int, head: int, ages: dict[int, int]) -> dict[int, float]:
        near = [i for i, age in ages.items() if window is None or age < window]
        near.sort(key=lambda i: (ages[i] + 2) * float(log_beta[row, head, i]), reverse=True)
        return dict.fromkeys(near[:4], 0.0)

    expected = attend_one_by_one(query, key, value, now, keep_best)
    torch.testing.assert_close(attend_to_kept(query, key, value, log_beta, now, window), expected)
    columns = torch.tensor([[2, 9, 10, 20, 22, 22], [0, 1, 5, 6, 21, 22]])  # answers alone attend just as they would
    picked, wanted = (each.take_along_dim(columns[:, None, :, None], dim=2) for each in (query, expected))
    torch.testing.assert_close(
        attend_to_kept(picked, key, value, log_beta, replace(now, columns=columns), window), wanted
    )


def test_a_token_that_should_have_been_kept_learns_to_last() -> None:
    """Catches a border without a gradient, on either side of it, and one that depends on how far everything fades."""
    torch.manual_seed(0)
    now = TrainingPass(
        positions=torch.arange(12)[None], documents=torch.zeros(1, 12), gated=True, border=Border(slots=4, sharpness=5)
    )
    query, key = torch.ones(1, 1, 12, 4), torch.zeros(1, 1, 12, 4)
    value = torch.zeros(1, 1, 12, 4)
    value[0, 0, 2] = 1.0  # what the last query wants
    gradients = []
    for scale in (1.0, 1e-4):
        log_beta = torch.full((1, 1, 12), -0.5 * scale)
        log_beta[0, 0, 2] = -0.17 * scale  # just below the border
        lasting = (-torch.log(-log_beta)).requires_grad_()
        attended = attend_to_kept(query, key, value, -torch.exp(-lasting), now, None)
        (gradient,) = torch.autograd.grad(attended[0, 0, -1].sum(), lasting)
        gradients.append(gradient)
    assert gradients[0][0, 0, 2] > 0.01
    assert gradients[0].min() < -0.001
    assert abs(gradients[0].sum()) < 1e-5
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_the_soft_border_has_the_gradient_of_its_formula() -> None:
    """Catches a backward pass, written by hand, of something else than the forward pass."""
    torch.manual_seed(0)
    query = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    lasting = torch.randn(2, 2, 9, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, 2, 2, 9, 4, dtype=torch.float64)
    log_ages = torch.rand(2, 1, 5, 9, dtype=torch.float64) * 3
    log_ages[:, :, :, 7:] = 1e4

    def attend(query: torch.Tensor, lasting: torch.Tensor) -> torch.Tensor:
        attended = eviction._SoftBorder.apply(query, key, value, lasting, log_ages, Border(slots=4, sharpness=2.0))
        assert isinstance(attended, torch.Tensor)
        return attended

    assert torch.autograd.gradcheck(attend, (query, lasting))


def test_an_evicting_student_learns(tiny_model: TinyModel) -> None:
    """Catches slots that do not reach the attention, and losses that do not reach the gates."""
    trainer = make_trainer(tiny_model("qwen3"), student="evicting", memory_size=6, cap_weight=0.0, lr=3e-2)
    batch = make_batch(rows=4)
    before, full = (trainer.losses(trainer.teach(batch), border=Border(slots=slots, sharpness=6)) for slots in (6, 24))
    for _ in range(25):
        trainer.step([trainer.teach(batch)])
    after = trainer.losses(trainer.teach(batch), border=Border(slots=6, sharpness=6))
    assert full[0].item() < 1e-6 < before[0].item()
    assert (after[0] + after[1]).item() < (before[0] + before[1]).item() - 0.1


def test_nothing_is_learnt_where_nothing_is_evicted(tiny_model: TinyModel) -> None:
    """Catches a run that ends when all sequences of a step are shorter than the slots that were drawn."""
    trainer = make_trainer(tiny_model("qwen3"), student="evicting", memory_size=100, cap_weight=0.0)
    before = {name: parameter.clone() for name, parameter in trainer.parameters.items()}
    assert trainer.step([trainer.teach(make_batch())]).kl < 1e-6
    assert trainer.steps_done == 1
    assert all(torch.equal(before[name], parameter) for name, parameter in trainer.parameters.items())


def test_the_border_of_a_forward_is_the_same_after_a_restart() -> None:
    """Catches a draw that a resumed run changes, one that leaves its range, and a border that never sharpens."""
    options = TrainOptions(memory_size=32, context=8, steps=100, student="evicting")
    drawn = [options.border_at(step, forward) for step in range(100) for forward in range(2)]
    assert drawn == [options.border_at(step, forward) for step in range(100) for forward in range(2)]
    slots = [border.slots for border in drawn]
    assert min(slots) < 20
    assert max(slots) > 100
    assert all(16 <= count <= 128 for count in slots)
    assert slots[::2] != slots[1::2]
    assert drawn[0].sharpness == SOFTEST
    assert drawn[-1].sharpness > 5
    assert {"steps", "border_sharpness"} <= options.identity().keys()
    assert TrainOptions(memory_size=32, context=8, steps=1).border_at(0, 0) is None
