"""The reference operations against a brute force over the full history, and against the authors' own eviction cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.oracle import Head
from trimkv_kernels import Journal, Slots, reference

GOLDEN = Path(__file__).parents[1] / "golden"
SCALE = 0.37


def make_slots(*, rows: int = 1, heads: int = 1, slots: int, dim: int = 4) -> Slots:
    made = Slots.empty(
        rows=rows, num_kv_heads=heads, slots=slots, head_dim=dim, dtype=torch.float32, device=torch.device("cpu")
    )
    made.key.fill_(torch.nan)  # what no token has written must never be read
    made.value.fill_(torch.nan)
    return made


def kept(slots: Slots, row: int, head: int) -> list[int]:
    return sorted(p for p in slots.position[row, head].tolist() if p >= 0)


@st.composite
def streams(draw: st.DrawFn) -> dict[str, object]:
    """Rows of different lengths fed in different chunks, gates with many ties, odd sizes."""
    rows, heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    chunks = [[draw(st.integers(0, 9)) for _ in range(draw(st.integers(1, 6)))] for _ in range(rows)]
    for sizes in chunks:
        sizes[0] = max(sizes[0], 1)
    return {
        "heads": heads,
        "groups": groups,
        "budget": draw(st.integers(1, 12)),
        "window": draw(st.none() | st.integers(1, 9)),
        "chunks": chunks,
        "sinks": draw(st.booleans()),
        "gates": draw(st.sampled_from(["ties", "zero", "spread", "static", "static"])),
        "protects": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


def draw_log_beta(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if kind == "zero":
        return np.zeros(shape, np.float32)
    if kind == "ties":
        return rng.choice(np.array([0.0, -0.25, -0.5, -1.0], np.float32), shape)
    if kind == "static":
        few = [np.finfo(np.float32).min, -2.0, -1e-3, -0.0, 0.0, 1e-38, 0.5, 3.0, 3e38]
        return np.where(rng.random(shape) < 0.6, rng.choice(few, shape), rng.normal(size=shape)).astype(np.float32)
    return -np.exp(rng.normal(-2.0, 2.0, shape)).astype(np.float32)


def draw_spans(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Draw two intervals for each row; some of them are empty, or turned round, or overlap."""
    return rng.integers(-2, 14, (rows, 2, 2)).astype(np.int32)


@settings(max_examples=120)
@given(streams())
def test_kept_sets_and_outputs_equal_brute_force(stream: dict) -> None:
    """Catches a wrong loser or tie, a token seen after its eviction, an unmasked slot, counted padding, a lost sink.

    With scores that do not fade: signs and zeros in the wrong order, no number taken for a pin or for an empty slot.
    With protected intervals: a token of one that goes, one that stays when its interval is another's by then.
    """
    rng = np.random.default_rng(stream["seed"])
    heads, groups, window, dim = stream["heads"], stream["groups"], stream["window"], 4
    size = stream["budget"] if window is None else min(stream["budget"], window)
    rows = len(stream["chunks"])
    slots = make_slots(rows=rows, heads=heads, slots=size, dim=dim)
    journal = Journal.beside(slots)
    sinks = rng.normal(0.0, 2.0, (heads, groups)).astype(np.float32) if stream["sinks"] else None
    taken = None if sinks is None else torch.from_numpy(sinks).flatten()
    each = [()] * heads if sinks is None else [tuple(own) for own in sinks.tolist()]
    static = stream["gates"] == "static"
    oracle = [[Head(budget=size, window=window, sinks=own, static=static) for own in each] for _ in range(rows)]
    seen = [0] * rows
    for step in range(max(map(len, stream["chunks"]))):
        lengths = [sizes[step] if step < len(sizes) else 0 for sizes in stream["chunks"]]
        longest = max(lengths)
        if longest == 0:
            continue
        query = rng.normal(size=(rows, heads * groups, longest, dim)).astype(np.float32)
        key, value = rng.normal(size=(2, rows, heads, longest, dim)).astype(np.float32)
        log_beta = draw_log_beta(stream["gates"], (rows, heads, longest), rng)
        left = rng.random() < 0.5
        positions = np.full((rows, longest), -1, np.int32)
        columns = [slice(longest - n, longest) if left else slice(0, n) for n in lengths]
        for row, n in enumerate(lengths):
            positions[row, columns[row]] = np.arange(seen[row], seen[row] + n)
        tensors = [torch.from_numpy(array.copy()) for array in (query, key, value, log_beta, positions)]
        fill = min(max(seen), size)
        spans = draw_spans(rng, rows) if stream["protects"] else None
        ranks = {"static": static, "spans": None if spans is None else torch.from_numpy(spans)}
        if longest == 1 and step % 2:
            dense = all(min(s, size) == fill for s, n in zip(seen, lengths, strict=True) if n)
            q, k, v, b, p = tensors
            output = reference.decode(
                q[:, :, 0], k[:, :, 0], v[:, :, 0], b[:, :, 0], p[:, 0], slots, journal,
                fill=fill, dense=dense, scale=SCALE, window=window, sinks=taken, **ranks,
            )[:, :, None]  # fmt: skip
        else:
            output = reference.prefill(
                *tensors, slots, rows=torch.arange(rows), fill=fill, scale=SCALE, window=window, sinks=taken, **ranks
            )
        for row, n in enumerate(lengths):
            seen[row] += n
            if n == 0:
                continue
            for head in range(heads):
                oracle[row][head].spans = () if spans is None else tuple(map(tuple, spans[row].tolist()))
                want = oracle[row][head].step(
                    query[row, head * groups : (head + 1) * groups, columns[row]],
                    key[row, head, columns[row]],
                    value[row, head, columns[row]],
                    log_beta[row, head, columns[row]],
                    SCALE,
                )
                got = output[row, head * groups : (head + 1) * groups, columns[row]].numpy()
                np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
                assert kept(slots, row, head) == oracle[row][head].kept
    for row in range(rows):
        for head in range(heads):
            for slot, position in enumerate(slots.position[row, head].tolist()):
                if position >= 0:  # each slot holds the very key and value of its position
                    np.testing.assert_array_equal(slots.key[row, head, slot], oracle[row][head].keys[position])
                    np.testing.assert_array_equal(slots.value[row, head, slot], oracle[row][head].values[position])


def test_slots_fill_in_order_and_full_rows_touch_one_slot() -> None:
    """Catches copies of the whole cache: a full decode step must change exactly one slot per head, or none."""
    slots = make_slots(slots=5, heads=2)
    generator = torch.Generator().manual_seed(0)
    for position in range(12):
        before = slots.position.clone()
        reference.decode(
            torch.randn(1, 2, 4, generator=generator),
            torch.randn(1, 2, 4, generator=generator),
            torch.randn(1, 2, 4, generator=generator),
            -torch.rand(1, 2, generator=generator),
            torch.tensor([position], dtype=torch.int32),
            slots,
            Journal.beside(slots),
            fill=min(position, 5),
            dense=True,
            scale=1.0,
            window=None,
        )
        changed = (slots.position != before).sum(-1)
        assert (changed <= 1).all()
        if position < 5:
            assert (slots.position[..., : position + 1] >= 0).all()
            assert (slots.position[..., position + 1 :] < 0).all()


def _golden_cases() -> list[tuple[int, ...]]:
    return [tuple(int(x) for x in row) for row in np.load(GOLDEN / "evict_cases.npz")["cases"]]


def test_golden_eviction_cases() -> None:
    """Catches any difference from the authors' code: which M of T tokens stay at step q_idx, in all their cases."""
    data = np.load(GOLDEN / "evict_cases.npz")
    for heads, tokens, budget, q_idx, offset, kept_offset in _golden_cases():
        log_beta = data["log_beta"][offset : offset + heads * tokens].reshape(heads, tokens)
        positions = data["positions"][offset : offset + heads * tokens].reshape(heads, tokens)
        want = data["kept_index"][kept_offset : kept_offset + heads * budget].reshape(heads, budget)
        for head in range(heads):
            scores = reference._scores(
                torch.from_numpy(log_beta[head].astype(np.float32)),
                torch.from_numpy(positions[head].astype(np.int32)),
                torch.tensor(q_idx - 2),
                None,
            )
            rank = reference._rank(scores, torch.from_numpy(positions[head].astype(np.int32)))
            assert sorted(rank.topk(budget, largest=False).indices.tolist()) == sorted(want[head].tolist())


@pytest.mark.parametrize("window", [None, 3])
def test_a_row_without_a_token_keeps_its_slots(window: int | None) -> None:
    """Catches eviction in rows that have ended."""
    slots = make_slots(rows=2, slots=3)
    everything = {"fill": 0, "scale": 1.0, "window": window}
    x = torch.ones(2, 1, 2, 4)
    positions = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    reference.prefill(x, x, x, -torch.ones(2, 1, 2), positions, slots, rows=torch.arange(2), **everything)
    before = slots.position.clone()
    y, idle = torch.ones(2, 1, 4), torch.tensor([2, -1], dtype=torch.int32)
    journal = Journal.beside(slots)
    reference.decode(y, y, y, -torch.ones(2, 1), idle, slots, journal, **{**everything, "fill": 2}, dense=True)
    assert torch.equal(slots.position[1], before[1])
    assert not torch.equal(slots.position[0], before[0])


def test_eight_bits_evict_and_undo_as_others_do() -> None:
    """Catches gather and scatter, which torch lacks for them, a lost byte when a step is undone, and NaN beyond 448."""
    torch.manual_seed(0)
    bits = Slots.empty(
        rows=2, num_kv_heads=2, slots=5, head_dim=8, dtype=torch.float8_e4m3fn, device=torch.device("cpu")
    )
    plain = Slots(*(tensor.float() if tensor.dim() == 4 else tensor.clone() for tensor in bits))
    journals = [Journal.beside(slots) for slots in (bits, plain)]

    def draw(*shape: int) -> torch.Tensor:
        return (300.0 * torch.randn(*shape)).to(torch.float8_e4m3fn).float().nan_to_num(nan=448.0)

    chunk = draw(2, 4, 3, 8), draw(2, 2, 3, 8), draw(2, 2, 3, 8), -torch.rand(2, 2, 3)
    positions = torch.arange(3, dtype=torch.int32).expand(2, -1)
    how = {"rows": torch.tensor([1, 0]), "fill": 0, "scale": 0.01, "window": None}
    outputs = [reference.prefill(*chunk, positions, slots, **how) for slots in (bits, plain)]
    assert torch.equal(*outputs)
    for now in range(3, 9):
        token = draw(2, 4, 8), draw(2, 2, 8), draw(2, 2, 8), -torch.rand(2, 2)
        position = torch.full((2,), now, dtype=torch.int32)
        before = [tensor.clone() for tensor in bits]
        one = {"fill": min(now, 5), "dense": True, "scale": 0.01, "window": None}
        for _ in range(2):  # once more as if the first had never been
            outputs = [
                reference.decode(*token, position, slots, journal, **one)
                for slots, journal in zip((bits, plain), journals, strict=True)
            ]
            assert torch.equal(*outputs)
            for slots, journal in zip((bits, plain), journals, strict=True):
                journal.undo(position, slots)
            assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(bits, before, strict=True))
        for slots, journal in zip((bits, plain), journals, strict=True):
            reference.decode(*token, position, slots, journal, **one)
        assert all(torch.equal(x.float(), y.float()) for x, y in zip(bits, plain, strict=True))
    index = torch.tensor([4, 0]).expand(2, 2, -1)
    assert all(torch.equal(x.float(), y) for x, y in zip(bits.taken(index), plain.taken(index), strict=True))
    wide = draw(2, 2, 8)
    wide[..., 0], wide[..., 1] = 1e4, -torch.inf
    reference.decode(draw(2, 4, 8), wide, wide, torch.zeros(2, 2), position + 1, bits, journals[0], **one)
    entered = bits.value.float()[bits.position == 9]
    assert entered[:, :2].tolist() == [[448.0, -448.0]] * 4


def test_cleared_slots_hold_no_old_values() -> None:
    """Catches a value that is no number, left by an earlier request, times 0 in a kernel that masks weights alone."""
    slots = make_slots(rows=2, slots=3)
    slots.rows(1, 1).clear()
    assert slots.value[1].eq(0).all()
    assert slots.value[0].isnan().all()
