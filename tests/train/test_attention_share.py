"""The loss that asks how much of the model's attention slots would keep: against a cache written out."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.tiny_training import make_batch, make_trainer
from trimkv_cli.errors import UsageError
from trimkv_cli.train import attention_share
from trimkv_cli.train.attention_share import lost_attention
from trimkv_cli.train.options import Border, TrainOptions
from trimkv_cli.train.packing import watch
from trimkv_cli.train.training_pass import TeacherStates, TrainingPass

TinyModel = Callable[..., Any]


class _Table(nn.Module):
    """Score tokens as given."""

    def __init__(self, log_beta: Tensor) -> None:
        super().__init__()
        self.log_beta = nn.Parameter(log_beta)  # [B, T, Hkv]

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return self.log_beta


def _states(columns: Tensor, *, length: int = 22, dtype: torch.dtype = torch.float32) -> TeacherStates:
    torch.manual_seed(0)
    states = TeacherStates(columns)
    states.queries[0] = torch.randn(2, 4, columns.shape[1], 8, dtype=dtype)
    states.keys[0] = torch.randn(2, 2, length, 8, dtype=dtype)
    states.hidden[0] = torch.zeros(2, length, 1)
    return states


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("block", [64, 3])
def test_the_loss_is_the_attention_that_a_cache_would_have_lost(
    monkeypatch: pytest.MonkeyPatch, window: int | None, block: int
) -> None:
    """Catches another order than the cache's, a query of another place, heads that mix, and weights left out."""
    monkeypatch.setattr(attention_share, "QUERY_BLOCK", block)
    batch = make_batch(length=24)
    columns = torch.tensor([[3, 7, 11, 15, 21], [0, 6, 12, 18, 20]])
    weights = torch.tensor([[1.0, 0.5, 0.25, 1.0, 2.0], [1.0, 0.0, 1.0, 0.5, 1.0]])
    now = batch.make_pass(gated=True, border=Border(slots=4, sharpness=1e6), columns=columns)
    states = _states(columns, length=24)
    log_beta = -torch.rand(2, 24, 2)
    found = lost_attention(states, [_Table(log_beta)], now, weights, [window])
    expected = 0.0
    for row in range(2):
        for at, column in enumerate(columns[row].tolist()):
            for head in range(4):
                ages = {
                    i: int(batch.positions[row, column] - batch.positions[row, i])
                    for i in range(column + 1)
                    if batch.documents[row, i] == batch.documents[row, column]
                }
                near = [i for i, age in ages.items() if window is None or age < window]
                logits = torch.stack(
                    [states.queries[0][row, head, at] @ states.keys[0][row, head // 2, i] for i in near]
                )
                attention = dict(zip(near, logits.softmax(0).tolist(), strict=True))
                best = sorted(near, key=lambda i: (ages[i] + 2) * float(log_beta[row, i, head // 2]), reverse=True)[:4]
                expected -= float(weights[row, at]) * log(sum(attention[i] for i in best) + 1e-6) / 4
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_the_gradient_is_that_of_the_formula() -> None:
    """Catches a gradient, written by hand, of something else than the loss."""
    columns = torch.tensor([[5, 8, 9], [4, 9, 9]])
    now = TrainingPass(
        positions=torch.arange(10).expand(2, 10),
        documents=torch.zeros(2, 10),
        gated=True,
        border=Border(slots=3, sharpness=2.0),
        columns=columns,
    )
    states = _states(columns, length=10, dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.5, 0.0], [1.0, 2.0, 1.0]], dtype=torch.float64)
    query, key = states.queries[0], states.keys[0]

    def loss(lasting: Tensor) -> Tensor:
        found = attention_share._LostAttention.apply(lasting, query, key, now, weights, None)
        assert isinstance(found, Tensor)
        return found

    assert torch.autograd.gradcheck(loss, (torch.randn(2, 2, 10, dtype=torch.float64, requires_grad=True),))


def test_the_first_updates_run_no_student(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a start that costs as much as what follows, one that does not learn, and a student that never begins."""
    trainer = make_trainer(
        tiny_model("qwen3"), student="evicting", memory_size=6, attention_steps=20, attention_weight=0.5, lr=3e-2
    )
    batch, border = make_batch(rows=4), Border(slots=6, sharpness=6)
    lessons = trainer.losses
    monkeypatch.setattr(trainer, "losses", lambda *_, **__: pytest.fail("a student ran"))
    before = trainer._lost_attention(trainer.teach(batch), border)
    started = [trainer.step([trainer.teach(batch)]) for _ in range(20)]
    after = trainer._lost_attention(trainer.teach(batch), border)
    assert after.item() < 0.9 * before.item()
    assert started[0].kl is None
    assert started[0].total == started[0].attention
    monkeypatch.setattr(trainer, "losses", lessons)
    both = trainer.step([trainer.teach(batch)])
    assert both.kl is not None
    assert both.attention is not None
    assert both.total == pytest.approx(both.kl + (both.ntp or 0) + 0.5 * both.attention)


def test_a_step_in_parts_is_the_step(tiny_model: TinyModel) -> None:
    """Catches attention that is a mean over each forward instead of the step."""
    found = []
    for parts in (1, 2):
        trainer = make_trainer(tiny_model("qwen3"), student="evicting", memory_size=6, attention_steps=1)
        batches = [make_batch(rows=2, seed=seed) for seed in (1, 2)]
        whole = type(batches[0])(*(torch.cat(pair) for pair in zip(*(batch[:5] for batch in batches), strict=True)))
        split = [whole] if parts == 1 else [type(whole)(*(each[at : at + 2] for each in whole[:5])) for at in (0, 2)]
        border = Border(slots=6, sharpness=6)
        counts = type(trainer.teach(whole).counts).of(split)
        found.append(sum(trainer._lost_attention(trainer.teach(part, counts), border).item() for part in split))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_answers_and_what_asks_for_them_are_watched() -> None:
    """Catches a shift by one, padding that is watched, and answers crowded out of a text that is all wanted."""
    wanted = np.zeros(400, dtype=np.bool_)
    wanted[300:310] = True
    documents = np.where(np.arange(400) < 350, 0, -1)
    weights = watch(wanted, documents, np.random.default_rng(0))
    assert (weights[299:309] == 1).all()
    assert (weights[279:299] == 0.5).all()
    assert not weights[350:].any()
    assert 30 < (weights == 0.25).sum() <= 48
    everything = watch(np.ones(2000, dtype=np.bool_), np.zeros(2000, dtype=np.int64), np.random.default_rng(0))
    assert (everything == 1).sum() == 256


def test_attention_teaches_evicting_students_only() -> None:
    """Catches options that would do nothing."""
    with pytest.raises(UsageError, match="fading"):
        TrainOptions(memory_size=4, context=8, steps=1, attention_steps=1)
