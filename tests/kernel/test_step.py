"""Every kernel of a whole decode step against its reference: in the interpreter here, on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.kernel_devices import CPU, GPU
from trimkv_kernels import Journal, LayerTable, Slots, reference, step_reference
from trimkv_kernels.step_reference import Norm

pytest.importorskip("triton", reason="triton has no wheel for this platform")
from trimkv_kernels import rows as between
from trimkv_kernels import step

# A rounding or two of sums in another order; the interpreter cuts bfloat16 off instead.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 4e-2}
DTYPES = list(TOLERANCE)


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, atol=TOLERANCE[got.dtype], rtol=TOLERANCE[got.dtype])


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 67, 1100])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_equal_their_reference(size: int, offset: float, dtype: torch.dtype, device: str) -> None:
    """Catches a mean over the padded width, a norm before rounding what the stream holds, a weight without its 1."""
    torch.manual_seed(0)
    stream, added = (torch.randn(3, size).to(device, dtype) for _ in range(2))
    norm, before = (Norm(torch.randn(size).to(device, dtype), eps, offset) for eps in (1e-6, 0.3))
    for new, first in ((None, None), (added, None), (added, before)):
        mine, other = stream.clone(), stream.clone()
        out = torch.full((3, size), torch.nan, dtype=dtype, device=device)
        got = step.add_norm(mine, new, norm, before=first, out=out)
        near(got, step_reference.add_norm(other, new, norm, before=first))
        near(mine, other)
        assert got is out


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_normed_and_rotated_as_by_their_reference(
    dim: int, normed: bool, dtype: torch.dtype, device: str
) -> None:
    """Catches a key normed as a query, a value that is rotated, halves the wrong way round, heads of another row."""
    torch.manual_seed(0)
    queries, heads, rows = 3, 1, 2
    qkv = torch.randn(rows, (queries + 2 * heads) * dim).to(device, dtype)
    angles = torch.randn(rows, dim // 2).mul(10).to(device)
    cos, sin = torch.cat((angles.cos(),) * 2, dim=-1), torch.cat((-angles.sin(), angles.sin()), dim=-1)
    norms: dict[str, Any] = {}
    if normed:
        norms = {name: Norm(torch.randn(dim).to(device, dtype), 1e-5, 1.0) for name in ("query_norm", "key_norm")}
    found = []
    for rotate in (step.rotate, step_reference.rotate):
        key, value = (torch.full((rows, heads, dim), torch.nan, dtype=dtype, device=device) for _ in range(2))
        found.append((rotate(qkv, cos, sin, key=key, value=value, **norms), key, value))
    for got, want in zip(*found, strict=True):
        near(got, want)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_activations_equal_their_reference(kind: str, dtype: torch.dtype, device: str) -> None:
    """Catches halves in the other order, a piece that ends beyond the row, an overflow far from 0."""
    gate_up = torch.linspace(-120, 120, 3 * 2 * 1100).view(3, -1).to(device, dtype)
    near(step.activate(gate_up, kind), step_reference.activate(gate_up, kind))


def make_layers(sizes: tuple[int, ...], *, rows: int, heads: int, dim: int, device: str) -> list[tuple[Slots, Journal]]:
    """Return layers with slots in any order, the last rows' partly empty, some tokens pinned, all of equal scores."""
    layers = []
    for size in sizes:
        slots = Slots.empty(
            rows=rows, num_kv_heads=heads, slots=size, head_dim=dim, dtype=torch.float32, device=torch.device(device)
        )
        for row in range(rows):
            fill = max(0, size - 2 * row)
            order = torch.stack([torch.randperm(60)[:fill] for _ in range(heads)])
            slots.position[row, :, :fill] = order.int().to(device)
            slots.log_beta[row, :, :fill] = -torch.randint(0, 3, (heads, fill)).float().to(device) / 8
            slots.log_beta[row, :, 1:fill:5] = torch.inf
            for tensor in (slots.key, slots.value):
                tensor[row, :, :fill] = torch.randn(heads, fill, dim).to(device)
        layers.append((slots, Journal.beside(slots)))
    return layers


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("kernels", [step, step_reference], ids=["triton", "reference"])
@pytest.mark.parametrize(
    ("recent", "static", "protects"),
    [(0, False, False), (3, False, True), (0, True, True)],
    ids=["", "recent", "static"],
)
def test_two_halves_are_one_decode(recent: int, static: bool, protects: bool, kernels: Any, device: str) -> None:
    """Catches a wrong loser or tie, a slot of another layer, row or head, a journal that cannot be undone.

    Also a row without a token that is fed, a window that reaches another layer, rows beyond those of the step.
    """
    torch.manual_seed(0)
    rows, heads, groups, dim, windows = 3, 2, 2, 16, (None, 9, None)
    layers = make_layers((11, 9, 11), rows=rows + 1, heads=heads, dim=dim, device=device)
    copies = [tuple(type(part)(*(tensor.clone() for tensor in part)) for part in layer) for layer in layers]
    table = LayerTable.of(layers)
    ranks: dict[str, Any] = {"recent": recent, "static": static}
    for now in (60, 61):
        position = torch.tensor([now, -1, now - 1], dtype=torch.int32, device=device)
        ranks["spans"] = torch.randint(0, 60, (rows, 2, 2), dtype=torch.int32).to(device) if protects else None
        query = torch.randn(3, rows, heads * groups, dim).to(device)
        keys, values = torch.randn(2, 3, rows, heads, dim).to(device)
        log_beta = -torch.randint(0, 3, (3, rows, heads)).float().to(device) / 8
        lowest = torch.empty(3, rows, heads, device=device)
        loser = torch.empty(3, rows, heads, dtype=torch.int32, device=device)
        before = [slots.key.clone() for slots, _ in layers]
        for i, window in enumerate(windows):
            token = query[i], keys[i], values[i]
            how: dict[str, Any] = {"scale": 0.3, "window": window, **ranks}
            got = kernels.attend(*token, position, layers[i][0], lowest=lowest[i], loser=loser[i], **how)
            fill = layers[i][0].position.shape[2]
            rest = log_beta[i], position, *copies[i]
            want = reference.decode(*token, *rest, fill=fill, dense=False, **how)
            torch.testing.assert_close(got[::2], want[::2], atol=2e-5, rtol=2e-5)
            assert torch.equal(layers[i][0].key, before[i])
            plain = kernels.attend(*token, position, layers[i][0], **how)
            assert torch.equal(plain[::2], got[::2])
        kernels.evict(keys, values, log_beta, position, table, lowest=lowest, loser=loser, **ranks)
        assert any(not torch.equal(slots.key, old) for (slots, _), old in zip(layers, before, strict=True))
        for mine, other in zip(layers, copies, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine[0], other[0], strict=True))
            assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(mine[1], other[1], strict=True))
        after = [[tensor.clone() for tensor in slots] for slots, _ in layers]
        for (slots, journal), old in zip(layers, before, strict=True):
            journal.undo(position, slots)
            assert torch.equal(slots.key, old)
        for (slots, _), held in zip(layers, after, strict=True):
            for tensor, then in zip(slots, held, strict=True):
                tensor.copy_(then)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_rows_are_undone_and_emptied_in_all_layers_at_once(dtype: torch.dtype, device: str) -> None:
    """Catches a layer with fewer slots, a row without a token, one that a token never entered, a row beside it."""
    torch.manual_seed(0)
    rows, heads, dim = 3, 2, 20
    how: dict[str, Any] = {"rows": rows, "num_kv_heads": heads, "head_dim": dim, "device": torch.device(device)}
    layers, copies = [], []
    for size in (70, 9, 70):
        slots = Slots.empty(slots=size, dtype=dtype, **how)
        journal = Journal.beside(slots)
        for kept in (*slots[:2], *journal[:2]):
            kept.copy_(torch.randn(kept.shape).to(dtype))
        slots.log_beta.copy_(torch.randn(slots.log_beta.shape))
        slots.position.copy_(torch.stack([torch.randperm(size) for _ in range(rows * heads)]).view(rows, heads, size))
        journal.slot.copy_(slots.position.argmax(2))  # the newest token entered everywhere
        journal.slot[0, 1] = slots.position[0, 1].argmin()  # but for one head
        layers.append((slots, journal))
        copies.append((Slots(*map(torch.clone, slots)), journal))
    table = LayerTable.of(layers)
    position = torch.tensor([69, -1], dtype=torch.int32, device=device)
    steps: list[Any] = [lambda: between.undo(table, position), lambda: between.clear(table, 1)]
    wanted: list[Any] = [lambda: LayerTable.of(copies).undo(position), lambda: LayerTable.of(copies).clear(1)]
    for step_, want in zip(steps, wanted, strict=True):
        before = [tensor.clone() for tensor in layers[0][0]]
        step_()
        want()
        assert not torch.equal(layers[0][0].position, before[3])
        for (slots, _), (other, _) in zip(layers, copies, strict=True):
            assert all(torch.equal(a.float(), b.float()) for a, b in zip(slots, other, strict=True))
