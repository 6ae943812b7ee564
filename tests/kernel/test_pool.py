"""Decode for all layers together against the reference, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimkv_kernels import Journal, SlotPool, Slots, reference

LAYERS, ROWS, HEADS, GROUPS, DIM = 3, 3, 2, 2, 8


def random_tokens(generator: torch.Generator, ties: bool) -> tuple[torch.Tensor, ...]:
    """Return query, key, value `[L, R, heads, D]` and log_beta `[L, R, Hkv]`."""
    query = torch.randn(LAYERS, ROWS, HEADS * GROUPS, DIM, generator=generator)
    key, value = torch.randn(2, LAYERS, ROWS, HEADS, DIM, generator=generator)
    log_beta = -torch.rand(LAYERS, ROWS, HEADS, generator=generator)
    return query, key, value, torch.zeros_like(log_beta) if ties else log_beta


@pytest.mark.parametrize(
    ("ties", "static", "protects"),
    [(False, False, False), (True, False, True), (False, True, False), (True, True, True)],
)
@pytest.mark.parametrize(("size", "window"), [(1, None), (7, None), (7, 9), (4, 4)])
def test_a_pool_decodes_as_the_reference_does(
    size: int, window: int | None, ties: bool, static: bool, protects: bool
) -> None:
    """Catches a wrong loser or tie, an empty or outdated slot that is seen, a row that ended and goes on.

    Also a score of any sign that is multiplied or changes what is stored, a protected token that goes.
    """
    generator = torch.Generator().manual_seed(0)
    shape: dict[str, Any] = {"rows": ROWS + 1, "num_kv_heads": HEADS, "slots": size, "head_dim": DIM}
    pool = SlotPool(layers=LAYERS, window=window, static=static, dtype=torch.float32, **shape)
    alone = [Slots.empty(dtype=torch.float32, device=torch.device("cpu"), **shape) for _ in range(LAYERS)]
    journals = [Journal.beside(slots) for slots in alone]
    seen = [0] * ROWS
    for step in range(20):
        # The rows start at different times, and the last one pauses.
        fed = [step >= 2 * row and not (row == 2 and 12 <= step < 15) for row in range(ROWS)]
        position = torch.tensor([n if on else -1 for n, on in zip(seen, fed, strict=True)], dtype=torch.int32)
        query, key, value, log_beta = random_tokens(generator, ties)
        if static:
            broken = torch.rand(log_beta.shape, generator=generator) < 0.1
            log_beta = reference.finite(torch.where(broken, torch.nan, log_beta + 0.5))
        spans = torch.randint(0, 20, (ROWS, 2, 2), generator=generator, dtype=torch.int32) if protects else None
        dense = window is None and min(n for n, on in zip(seen, fed, strict=True) if on) >= size
        before = [tensor.clone() for layer in range(LAYERS) for tensor in pool.slots(layer)]
        bias = pool.begin(position, dense=dense)
        outputs = [pool.attend(i, query[i], key[i], value[i], bias, held=pool.held, scale=0.3) for i in range(LAYERS)]
        pool.evict(log_beta, position, spans)
        for i in range(LAYERS):
            token = query[i], key[i], value[i], log_beta[i], position
            settings: dict[str, Any] = {"fill": size, "dense": False, "scale": 0.3, "window": window}
            settings |= {"static": static, "spans": spans}
            want = reference.decode(*token, alone[i], journals[i], **settings)
            torch.testing.assert_close(outputs[i][fed], want[fed], atol=2e-6, rtol=2e-6)
            assert all(torch.equal(a, b) for a, b in zip(pool.slots(i), alone[i], strict=True))
        after = [tensor.clone() for layer in range(LAYERS) for tensor in pool.slots(layer)]
        for i in range(LAYERS):
            pool.journal(i).undo(position, pool.slots(i))
        undone = [tensor for layer in range(LAYERS) for tensor in pool.slots(layer)]
        assert all(torch.equal(a, b) for a, b in zip(undone, before, strict=True))
        for now, then in zip(undone, after, strict=True):
            now.copy_(then)
        seen = [n + on for n, on in zip(seen, fed, strict=True)]


def test_a_cleared_row_forgets_a_nan() -> None:
    """Catches a sequence that overflowed and spoils the next one in its row."""
    pool = SlotPool(
        layers=1, rows=1, num_kv_heads=1, slots=4, head_dim=DIM, window=None, dtype=torch.float32
    )  # fmt: skip
    pool.key.fill_(torch.nan)
    pool.value.fill_(torch.nan)
    pool.clear(0)
    position = torch.zeros(1, dtype=torch.int32)
    one = torch.ones(1, 1, DIM)
    assert not pool.attend(0, one, one, one, pool.begin(position, dense=False), held=pool.held, scale=1.0).isnan().any()
