"""The student's attention against the teacher's, against transformers, and against equation 3 written out."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.tiny_training import attend_one_by_one, make_batch, make_trainer
from trimkv_cli.train import attention
from trimkv_cli.train.attention import attend, hidden_states
from trimkv_cli.train.training_pass import TrainingPass

FAMILIES = ["qwen3", "qwen2", "llama", "mistral", "phi3", "gemma3"]
TinyModel = Callable[..., Any]


def silence(gates: Any) -> None:
    """Make log_beta 0: nothing fades."""
    with torch.no_grad():
        for gate in gates:
            gate.bias.fill_(1e4)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_fading_the_student_is_the_teacher(tiny_model: TinyModel, family: str) -> None:
    """Catches a mask, window, scale or head that only one of the two attentions has."""
    trainer = make_trainer(tiny_model(family).double())
    silence(trainer.gates)
    trainer.gates.double()
    batch = make_batch(length=40)
    with torch.no_grad():
        teacher, student = (
            hidden_states(trainer.model, batch.ids, batch.make_pass(gated=gated)) for gated in (False, True)
        )
    assert (teacher - student).abs().max() < 1e-5  # norms and softmax are float32
    assert teacher.abs().max() > 0.1
    kl, _, capacity = trainer.losses(trainer.teach(batch))
    assert kl.item() < 1e-6
    assert capacity.item() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_is_the_model(tiny_model: TinyModel, family: str) -> None:
    """Catches a teacher that attends otherwise than transformers does, sliding windows among it."""
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = tiny_model(family).get_decoder()(input_ids=ids).last_hidden_state
        trainer = make_trainer(tiny_model(family))
        positions = torch.arange(40).expand(2, -1)
        for one in (False, True):
            alone = torch.zeros_like(positions)
            now = TrainingPass(positions=positions, documents=alone, gated=False, one_document=one)
            found = hidden_states(trainer.model, ids, now)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_document_sees_no_other(tiny_model: TinyModel) -> None:
    """Catches attention across the documents that share a row."""
    trainer = make_trainer(tiny_model("qwen3"))
    batch = make_batch(rows=1)
    alone = batch.documents[0] == 1
    own = TrainingPass(
        positions=batch.positions[:, alone], documents=torch.zeros(1, int(alone.sum()), dtype=torch.long), gated=True
    )
    with torch.no_grad():
        packed = hidden_states(trainer.model, batch.ids, batch.make_pass(gated=True))[:, alone]
        single = hidden_states(trainer.model, batch.ids[:, alone], own)
    torch.testing.assert_close(packed, single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [512, 5])
def test_each_kv_head_fades_for_its_own_query_heads(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Catches a bias on the wrong query heads (3 per KV head), and blocks that lose a gradient."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    torch.manual_seed(0)
    batch = make_batch(length=13)
    now = batch.make_pass(gated=True)
    query, key, value = (torch.randn(2, heads, 13, 8) for heads in (6, 2, 2))
    log_beta = -torch.rand(2, 2, 13)
    results = []
    for function in (
        lambda lb: attend(
            SimpleNamespace(), query, key, value, None, scaling=0.3, training_pass=now, log_beta=lb, window=None
        )[0],
        lambda lb: attend_one_by_one(  # equation 3 written out
            query * 0.3, key, value, now, lambda row, head, ages: {i: age * lb[row, head, i] for i, age in ages.items()}
        ).transpose(1, 2),
    ):
        leaf = log_beta.clone().requires_grad_()
        output = function(leaf)
        (gradient,) = torch.autograd.grad((output * torch.arange(output.numel()).view_as(output)).sum(), leaf)
        results.append((output, gradient))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-2)
