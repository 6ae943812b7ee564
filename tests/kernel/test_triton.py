"""Every Triton operation against its reference: in the interpreter here, on a GPU where there is one."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from helpers.kernel_devices import CPU, GPU
from trimkv_kernels import Journal, Slots, reference

pytest.importorskip("triton", reason="triton has no wheel for this platform")
from trimkv_kernels import decode as triton_decode
from trimkv_kernels import prefill as triton_prefill
from trimkv_kernels import ranking
from trimkv_kernels.launch import Chip

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# rows, KV heads, queries per KV head, head_dim, slots, fill, window
DECODE_SHAPES = [
    (1, 2, 3, 80, 37, 37, None),
    (3, 1, 1, 64, 37, 20, None),
    (3, 2, 4, 16, 70, 70, 9),
    (1, 1, 16, 128, 130, 130, None),
    (2, 2, 2, 32, 5, 0, None),
    (2, 1, 5, 24, 1, 1, None),
]
# rows, KV heads, queries per KV head, head_dim, slots, fill, chunk, window
PREFILL_SHAPES = [
    (1, 2, 3, 80, 37, 37, 5, None),
    (2, 1, 1, 64, 37, 20, 33, None),
    (3, 2, 4, 16, 20, 20, 30, 9),
    (1, 1, 2, 128, 7, 0, 70, None),
    (2, 2, 2, 32, 1, 1, 3, None),
]


def make_slots(
    *, rows: int, heads: int, size: int, dim: int, fill: int, ties: bool, dtype: torch.dtype, device: str
) -> Slots:
    """Fill the first `fill` slots in any order, some of them pinned.

    All others hold what cleared slots may: keys that are no numbers, and values that are, of which nothing may be seen.
    """
    slots = Slots.empty(
        rows=rows, num_kv_heads=heads, slots=size, head_dim=dim, dtype=dtype, device=torch.device(device)
    )
    slots.key.fill_(torch.nan)
    slots.value.fill_(96.0)
    order = torch.stack([torch.randperm(fill + 5)[:fill] for _ in range(rows * heads)]).view(rows, heads, fill)
    slots.position[:, :, :fill] = order.int().to(device)
    for tensor in (slots.key, slots.value):
        tensor[:, :, :fill] = torch.randn(rows, heads, fill, dim).to(device, dtype)
    slots.log_beta[:, :, :fill] = (0.0 if ties else -1.0) * torch.rand(rows, heads, fill).to(device)
    slots.log_beta[:, :, 1:fill:7] = torch.inf
    return slots


def assert_same(got: Slots | Journal, want: Slots | Journal) -> None:
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", DECODE_SHAPES)
def test_decode_equals_its_reference(shape: tuple[Any, ...], dtype: torch.dtype, ties: bool, device: str) -> None:
    """Catches a wrong loser or tie, an empty slot with a weight, a row that ended and goes on, a lost split or sink."""
    if dtype is torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    rows, heads, groups, dim, size, fill, window = shape
    torch.manual_seed(0)
    slots = make_slots(rows=rows, heads=heads, size=size, dim=dim, fill=fill, ties=ties, dtype=dtype, device=device)
    mine = Slots(*(tensor.clone() for tensor in slots))
    position = torch.full((rows,), fill + 5, dtype=torch.int32, device=device)
    if rows > 1:
        position[-1] = -1
    query, key, value = (
        torch.randn(rows, n, dim).to(device, dtype) for n in (heads * groups, heads, heads)
    )  # fmt: skip
    log_beta = (0.0 if ties else -0.3) * torch.rand(rows, heads).to(device)
    settings: dict[str, Any] = {"fill": fill, "dense": False, "scale": dim**-0.5, "window": window}
    settings["recent"] = 3 if ties else 0
    settings["sinks"] = (3.0 * torch.randn(heads * groups)).to(device, dtype) if ties else None
    journal, other = Journal.beside(slots), Journal.beside(slots)
    before = Slots(*(tensor.clone() for tensor in slots))
    want = reference.decode(query, key, value, log_beta, position, slots, journal, **settings)
    got = triton_decode.decode(query, key, value, log_beta, position, mine, other, **settings)
    fed = max(1, rows - 1)
    torch.testing.assert_close(got[:fed], want[:fed], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert_same(mine, slots)
    assert_same(other, journal)
    other.undo(position, mine)
    assert_same(mine, before)
    got = triton_decode.decode(query, key, value, log_beta, position, mine, other, **settings, evict=False)
    torch.testing.assert_close(got[:fed], want[:fed], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert_same(mine, before)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="elsewhere a GPU has its own sizes")
@pytest.mark.parametrize("capability", [0, 80, 90, 120])
@pytest.mark.parametrize(("dim", "length"), [(24, 5), (80, 50), (136, 9)])
def test_sizes_chosen_for_any_gpu_give_the_same(
    dim: int, length: int, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a tile that ends within a token's queries, a split without slots, and slots that no split has."""
    chip = Chip(capability, multiprocessors=10 if capability else 1)
    monkeypatch.setattr(Chip, "of", lambda _: chip)
    torch.manual_seed(0)
    rows, heads, groups, size, fill = 2, 1, 3, 150, 140
    half: dict[str, Any] = {"dtype": torch.float16, "device": "cpu"}
    slots = make_slots(rows=rows, heads=heads, size=size, dim=dim, fill=fill, ties=False, **half)
    mine = Slots(*(tensor.clone() for tensor in slots))
    positions = torch.arange(fill + 5, fill + 5 + length, dtype=torch.int32).repeat(rows, 1)
    chunk = [torch.randn(rows, n, length, dim).half() for n in (heads * groups, heads, heads)]
    scores = -torch.rand(rows, heads, length)
    settings: dict[str, Any] = {"fill": fill, "scale": dim**-0.5, "window": None}
    one = *(tensor[:, :, 0] for tensor in (*chunk, scores)), positions[:, 0]
    journals = Journal.beside(slots), Journal.beside(slots)
    want = reference.decode(*one, slots, journals[0], dense=False, **settings)
    got = triton_decode.decode(*one, mine, journals[1], dense=False, **settings)
    torch.testing.assert_close(got, want, atol=4e-3, rtol=4e-3)
    settings["fill"] += 1
    rest = *(tensor[:, :, 1:] for tensor in (*chunk, scores)), positions[:, 1:]
    want = reference.prefill(*rest, slots, rows=torch.tensor([1, 0]), **settings)
    got = triton_prefill.prefill(*rest, mine, rows=torch.tensor([1, 0]), **settings)
    torch.testing.assert_close(got, want, atol=4e-3, rtol=4e-3)
    assert_same(mine, slots)
    assert_same(*journals)


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """Return numbers that 8 bits hold exactly: the interpreter rounds others wrongly."""
    return tensor.to(torch.float8_e4m3fn).to(tensor.dtype)


def assert_same_bytes(got: Slots, want: Slots) -> None:
    assert_same(*(Slots(tensors.key.float(), tensors.value.float(), *tensors[2:]) for tensors in (got, want)))


@pytest.mark.parametrize("device", [CPU, GPU])
def test_eight_bits_are_read_and_kept_as_the_reference_does(device: str) -> None:
    """Catches queries and weights in 8 bits, where small ones vanish, and numbers beyond them that become NaN."""
    torch.manual_seed(0)
    how: dict[str, Any] = {"rows": 2, "heads": 2, "size": 70, "dim": 32, "fill": 70, "ties": False, "device": device}
    slots = make_slots(**how, dtype=torch.float8_e4m3fn)
    mine = Slots(*(tensor.clone() for tensor in slots))
    before = Slots(*(tensor.clone() for tensor in slots))
    draw = [rounded(torch.randn(2, n, 32)).to(device) for n in (4, 2, 2)]
    draw[1][:, :, 3], draw[2][:, :, 5] = 1000.0, -1000.0
    settings: dict[str, Any] = {"fill": 70, "dense": False, "scale": 0.2, "window": None, "recent": 1}
    position = torch.tensor([75, 76], dtype=torch.int32, device=device)
    log_beta = -torch.rand(2, 2).to(device)
    journal, other = Journal.beside(slots), Journal.beside(slots)
    want = reference.decode(*draw, log_beta, position, slots, journal, **settings)
    got = triton_decode.decode(*draw, log_beta, position, mine, other, **settings)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert_same_bytes(mine, slots)
    assert (mine.key.float() == 448.0).any()
    assert (mine.value.float() == -448.0).any()
    other.undo(position, mine)
    assert_same_bytes(mine, before)

    chunk = [rounded(torch.randn(2, n, 9, 32)).to(device) for n in (4, 2, 2)]
    chunk[1][:, :, 2, 3] = 1000.0
    positions = torch.arange(75, 84, dtype=torch.int32, device=device).expand(2, -1)
    settings = {"rows": torch.tensor([1, 0], device=device), "fill": 70, "scale": 0.2, "window": None}
    others = Slots(*(tensor.clone() for tensor in before))
    scores = -torch.rand(2, 2, 9).to(device)
    want = reference.prefill(*chunk, scores, positions, others, **settings)
    got = triton_prefill.prefill(*chunk, scores, positions, mine, **settings)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert_same_bytes(mine, others)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", PREFILL_SHAPES)
def test_prefill_equals_its_reference(shape: tuple[Any, ...], dtype: torch.dtype, ties: bool, device: str) -> None:
    """Catches a wrong survivor, padding that is read, another head's sink, a slot written twice or not at all."""
    if dtype is torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    batch, heads, groups, dim, size, fill, length, window = shape
    torch.manual_seed(0)
    slots = make_slots(
        rows=batch + 2, heads=heads, size=size, dim=dim, fill=fill, ties=ties, dtype=dtype, device=device
    )
    mine = Slots(*(tensor.clone() for tensor in slots))
    rows = torch.randperm(batch + 2)[:batch].to(device)
    positions = torch.full((batch, length), -1, dtype=torch.int32)
    for row in range(batch):
        count = length if row == 0 else int(torch.randint(1, length + 1, (1,)))
        columns = slice(length - count, length) if row % 2 else slice(0, count)  # padding on either side
        positions[row, columns] = torch.arange(fill + 5, fill + 5 + count)
    positions = positions.to(device)
    query, key, value = (
        torch.randn(batch, n, length, dim).to(device, dtype) for n in (heads * groups, heads, heads)
    )  # fmt: skip
    for tensor in (query, key, value):
        tensor.masked_fill_(positions[:, None, :, None] < 0, torch.nan)
    log_beta = (0.0 if ties else -0.3) * torch.rand(batch, heads, length).to(device)
    log_beta[:, :, 2::11] = torch.inf
    settings: dict[str, Any] = {"rows": rows, "fill": fill, "scale": dim**-0.5, "window": window}
    settings["recent"] = 3 if ties else 0
    settings["sinks"] = (3.0 * torch.randn(heads * groups)).to(device, dtype) if ties else None
    want = reference.prefill(query, key, value, log_beta, positions, slots, **settings)
    got = triton_prefill.prefill(query, key, value, log_beta, positions, mine, **settings)
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert_same(mine, slots)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 4, 16, 70, 70, 9), (2, 2, 1, 24, 37, 20, None), (3, 1, 2, 16, 5, 5, None)])
def test_static_scores_and_protected_intervals_equal_their_reference(
    shape: tuple[Any, ...], static: bool, device: str
) -> None:
    """Catches a score times an age, a sign in the wrong order, the least taken for an empty slot, another row's."""
    rows, heads, groups, dim, size, fill, window = shape
    torch.manual_seed(0)
    slots = make_slots(
        rows=rows, heads=heads, size=size, dim=dim, fill=fill, ties=False, dtype=torch.float32, device=device
    )
    mine = Slots(*(tensor.clone() for tensor in slots))
    journals = Journal.beside(slots), Journal.beside(slots)
    settings: dict[str, Any] = {"fill": fill, "scale": dim**-0.5, "window": window, "static": static}
    for step in range(4):
        length = 1 if step % 2 else 6
        first = fill + 5 + 7 * step
        positions = torch.arange(first, first + length, dtype=torch.int32, device=device).repeat(rows, 1)
        positions[-1] = -1 if length == 1 else positions[-1]
        query, key, value = (torch.randn(rows, n, length, dim).to(device) for n in (heads * groups, heads, heads))
        log_beta = (
            torch.randn(rows, heads, length).to(device) if static else -torch.rand(rows, heads, length).to(device)
        )
        if static:
            log_beta[:, :, ::3] = torch.finfo(torch.float32).min
            slots.log_beta[:, :, :fill] += 0.4 * (step == 0)
            mine.log_beta[:, :, :fill] += 0.4 * (step == 0)
        settings["spans"] = torch.randint(0, first + length, (rows, 2, 2), dtype=torch.int32).to(device)
        if length == 1:
            one = *(tensor[:, :, 0] for tensor in (query, key, value, log_beta)), positions[:, 0]
            want = reference.decode(*one, slots, journals[0], dense=False, **settings)[:-1]
            got = triton_decode.decode(*one, mine, journals[1], dense=False, **settings)[:-1]
        else:
            chunk, at = (query, key, value, log_beta, positions), torch.arange(rows, device=device)
            want = reference.prefill(*chunk, slots, rows=at, **settings)
            got = triton_prefill.prefill(*chunk, mine, rows=at, **settings)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
        assert_same(mine, slots)
        settings["fill"] = min(size, settings["fill"] + length)
    assert_same(*journals)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_views_are_read_as_what_they_are(device: str) -> None:
    """Catches rows read as if they lay one behind the other: positions that all rows share, one column of a chunk."""
    rows, heads, groups, dim, length = 3, 2, 2, 16, 4
    torch.manual_seed(0)
    slots = make_slots(rows=rows, heads=heads, size=9, dim=dim, fill=9, ties=False, dtype=torch.float32, device=device)
    mine = Slots(*(tensor.clone() for tensor in slots))
    shared = torch.arange(14, 14 + length, dtype=torch.int32, device=device).expand(rows, -1)
    query, key, value = (
        torch.randn(rows, length, n, dim).to(device).transpose(1, 2) for n in (heads * groups, heads, heads)
    )
    log_beta = -torch.rand(rows, length, heads).to(device).transpose(1, 2)
    every_other = torch.arange(rows, device=device).repeat_interleave(2)[::2]
    settings: dict[str, Any] = {"fill": 9, "scale": dim**-0.5, "window": None}
    chunk = query, key, value, log_beta, shared
    want = reference.prefill(*chunk, slots, rows=every_other, **settings)
    got = triton_prefill.prefill(*chunk, mine, rows=every_other, **settings)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert_same(mine, slots)
    one = *(tensor[:, :, 1] for tensor in (query, key, value, log_beta)), (shared + length)[:, 1]
    journals = Journal.beside(slots), Journal.beside(slots)
    want = reference.decode(*one, slots, journals[0], dense=True, **settings)
    got = triton_decode.decode(*one, mine, journals[1], dense=True, **settings)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert_same(mine, slots)


def test_a_chunk_may_be_longer_than_the_second_axis_of_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a launch that a GPU refuses: only a grid's first axis goes beyond 65,535."""
    grids: list[tuple[int, ...]] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(triton_prefill, "_attend", Recorded())
    monkeypatch.setattr(triton_prefill, "_move", Recorded())
    monkeypatch.setattr(ranking, "_rank", Recorded())
    length = 70_000
    slots = Slots.empty(rows=1, num_kv_heads=1, slots=4, head_dim=16, dtype=torch.float32, device=torch.device("cpu"))
    token = torch.zeros(1, 1, length, 16)
    positions = torch.arange(length, dtype=torch.int32)[None]
    triton_prefill.prefill(
        token, token, token, -torch.ones(1, 1, length), positions, slots, rows=torch.arange(1), fill=0, scale=1.0,
        window=None,
    )  # fmt: skip
    assert len(grids) == 3
    assert all(size <= 65_535 for grid in grids for size in grid[1:])
