"""The losses against their formulas, in one piece and in many."""

from __future__ import annotations

import pytest
import torch

from helpers.tiny_training import make_batch
from trimkv_cli.train import losses
from trimkv_cli.train.losses import capacity_excess, distill, place_weights
from trimkv_cli.train.packing import Batch


def naive_excess(log_beta: torch.Tensor, batch: Batch, memory_size: int, window: int | None) -> torch.Tensor:
    """Add up (1/t) · max(0, Σ beta_i^(t−i) − M) token by token."""
    total = torch.zeros(())
    for row in range(len(batch.ids)):
        for t in range(batch.ids.shape[1]):
            document = batch.documents[row, t]
            own = [i for i in range(t + 1) if batch.documents[row, i] == document]
            ages = {i: int(batch.positions[row, t] - batch.positions[row, i]) for i in own}
            seen = [i for i in own if window is None or ages[i] < window]
            for head in range(log_beta.shape[1] if document >= 0 else 0):
                held = sum(torch.exp(log_beta[row, head, i]) ** ages[i] for i in seen)
                total = total + torch.clamp(held - memory_size, min=0) / len(own)
    return total


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("block", [512, 5])
def test_capacity(monkeypatch: pytest.MonkeyPatch, block: int, window: int | None) -> None:
    """Catches a wrong sum or gradient: at block borders, over documents, gaps, padding, out of the window."""
    monkeypatch.setattr(losses, "BLOCK", block)
    batch = make_batch()
    log_beta = -torch.rand(2, 3, 24, generator=torch.Generator().manual_seed(1)) * 0.2
    results = []
    for blockwise in (True, False):
        leaf = log_beta.clone().requires_grad_()
        if blockwise:
            now, weights = batch.make_pass(gated=True), place_weights(batch.documents)
            loss = capacity_excess(leaf, now, weights, memory_size=2, window=window)
        else:
            loss = naive_excess(leaf, batch, 2, window)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert float(results[0][0]) > 1
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_capacity_of_tokens_that_last_for_ever() -> None:
    """Catches NaN from 0 · ∞, and a count that is off by one: t tokens over M = 2 are t − 2."""
    documents = torch.zeros(1, 6, dtype=torch.long)
    batch = Batch(documents, documents > 0, torch.arange(6)[None], documents, torch.zeros(1, 6))
    weights = place_weights(documents)
    excess = capacity_excess(torch.zeros(1, 1, 6), batch.make_pass(gated=True), weights, memory_size=2)
    assert float(excess) == pytest.approx(1 / 3 + 2 / 4 + 3 / 5 + 4 / 6)


def test_logits_in_chunks() -> None:
    """Catches chunks that change losses or gradients, and a last chunk that is lost."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50)
    student, teacher = torch.randn(23, 8), torch.randn(23, 8)
    targets = torch.randint(0, 50, (23,))
    results = []
    for chunk in (None, 5):
        leaf = student.clone().requires_grad_()
        kl, ntp = distill(leaf, teacher, targets, head, vocab_size=50, chunk=chunk)
        results.append((kl.detach(), ntp.detach(), *torch.autograd.grad(kl + 2 * ntp, leaf)))
    torch.testing.assert_close(results[0], results[1])
    p, q = (torch.log_softmax(head(x), -1) for x in (teacher, student))
    torch.testing.assert_close(results[0][0], (p.exp() * (p - q)).sum().detach())


def test_logits_never_exist_at_once() -> None:
    """Catches a head that sees more than a chunk, forward or backward."""
    sizes = []
    head = torch.nn.Linear(8, 50)
    head.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    kl, ntp = distill(
        torch.randn(40, 8, requires_grad=True), torch.randn(40, 8), torch.zeros(40, dtype=torch.long), head,
        vocab_size=50, chunk=16,
    )  # fmt: skip
    (kl + ntp).backward()
    assert max(sizes) == 16
    assert sum(sizes) == 4 * 40


def test_without_wanted_tokens_there_is_no_loss() -> None:
    """Catches NaN from a batch of questions only."""
    none = torch.zeros(0, 8, requires_grad=True)
    losses = distill(none, none, torch.zeros(0, dtype=torch.long), torch.nn.Linear(8, 50), vocab_size=50)
    assert [loss.item() for loss in losses] == [0, 0]
