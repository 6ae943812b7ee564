"""Mistakes of the pictures: wrong figures, lines wider than the terminal, colour that says what no character says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
from rich.cells import cell_len
from rich.text import Text

from trimkv_cli.events import HeadMemory, LayerMemory, MemoryUse, Retained, survival
from trimkv_cli.ui.cache_panel import bin_shares, cache_panel, head_strip, layer_map, memory_map
from trimkv_cli.ui.inspection import headline, inspection
from trimkv_cli.ui.look import Look
from trimkv_cli.ui.tokens import next_out_line, survival_table, token_view

SEEN = 200
PIECES = ["<|im_start|>", "user\n", *(f" w{i}" for i in range(SEEN - 3)), " \x1b[2J語"]
MEMORY = MemoryUse(
    weights_bytes=400, gate_bytes=10, kv_bytes=100, workspace_bytes=90, peak_bytes=900, budget_bytes=1000,
    seen_tokens=SEEN, full_cache_bytes=4000,
)  # fmt: skip


def make_head(positions: range, *, full: bool = True) -> HeadMemory:
    log_beta = tuple(-0.01 * (1 + position % 7) for position in positions)
    scores = [value * (SEEN + 1 - p) for p, value in zip(positions, log_beta, strict=True)]
    return HeadMemory(positions=tuple(positions), log_beta=log_beta, threshold=min(scores) if full else None)


def make_retained(layers: int = 3, heads: int = 2, *, full: bool = True) -> Retained:
    ranges = [range(head, SEEN, 2 + head) for head in range(heads)]
    layer = LayerMemory(slots=SEEN // 2, window=None, heads=tuple(make_head(r, full=full) for r in ranges))
    return Retained(seen=SEEN, layers=(layer,) * layers)


VIEWS: dict[str, Callable[[Retained, Look], Text | str]] = {
    "map": memory_map,
    "layers": layer_map,
    "strip": head_strip,
    "tokens": lambda kept, look: token_view(kept, PIECES, look),
    "survival": lambda kept, look: survival_table(kept, PIECES, look, start=0, stop=SEEN),
    "next": lambda kept, look: next_out_line(kept, PIECES, look),
    "cache": lambda _, look: cache_panel(MEMORY, look),
    "all": lambda kept, look: inspection(kept, PIECES, MEMORY, look),
}


def show(name: str, look: Look, retained: Retained | None = None) -> str:
    shown = VIEWS[name](retained or make_retained(), look)
    return look.paint(shown) if isinstance(shown, Text) else shown


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_view_fits_and_needs_no_colour(name: str, width: int) -> None:
    """Catches lines that wrap, escape codes without colour, and colour that carries what no character does."""
    plain, coloured = show(name, Look(width=width)), show(name, Look(width=width, colour=True))
    assert all(cell_len(line) <= width for line in plain.splitlines())
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert show(name, Look(width=width, ascii=True)).isascii()


def test_a_share_counts_heads_and_a_survival_is_when_the_score_falls_below_the_threshold() -> None:
    """Catches a share over slots instead of heads, and an estimate that is off from stepping through the scores."""
    retained = make_retained()
    shares = retained.shares()
    assert (shares[0], shares[1], shares[5]) == (0.5, 0.5, 0.0)
    head = retained.layers[0].heads[0]
    assert head.threshold is not None
    for position, log_beta in zip(head.positions, head.log_beta, strict=True):
        steps = next(k for k in range(10**6) if log_beta * (SEEN + k + 1 - position) < head.threshold - 1e-9)
        expected = survival(SEEN, position, log_beta, head.threshold, None)
        assert steps - 1 <= expected + 1e-6 < steps + 1
    assert survival(SEEN, 5, 0.0, -1.0, None) == math.inf
    assert survival(SEEN, 150, 0.0, -1.0, 64) == 150 + 64 - SEEN


def test_a_static_score_says_nothing_of_how_long() -> None:
    """Catches a half-life of a score that has none, the wrong one first to go, and a pinned token that is in doubt."""
    head = HeadMemory(positions=(0, 1, 2, 3, 4), log_beta=(0.7, -0.2, math.inf, -5.0, 0.1), threshold=-5.0)
    free = HeadMemory(positions=(5,), log_beta=(1.0,), threshold=None)
    layer = LayerMemory(slots=5, window=None, static=True, protected=((3, 4),), heads=(head, free))
    retained = Retained(seen=6, layers=(layer,))
    assert [str(expected) for expected in retained.survivals()] == ["nan", "nan", "inf", "inf", "nan", "inf"]
    assert retained.next_out() == [(1, 1)]
    look = Look(width=80)
    table = look.paint(survival_table(retained, PIECES, look, start=0, stop=3)).splitlines()
    assert table[1].split() == ["0", "50%", "<|im_start|>"]
    assert look.infinity in table[3]


def test_the_map_has_64_bins_of_the_mean_share() -> None:
    """Catches bins that lose positions, and a height that is not the share of (layer, head) pairs."""
    shares = [1.0] * 100 + [0.0] * 100
    assert bin_shares(shares, 64) == [1.0] * 32 + [0.0] * 32
    assert bin_shares([0.25] * 3, 64) == [0.25] * 3
    assert bin_shares([], 64) == []
    lines = show("map", Look(width=80)).splitlines()
    assert len(lines[0].split("%", 1)[1]) <= 65
    assert lines[-1].split() == ["0", "100", "199"]


def test_tokens_stand_over_their_digits() -> None:
    """Catches digits that drift away from their tokens where characters are wide, and control characters."""
    lines = show("tokens", Look(width=80)).splitlines()
    assert len(lines) % 2 == 0
    words, digits = "".join(lines[0::2]), "".join(lines[1::2])
    assert "\x1b" not in words
    assert "␛" in words
    assert set(digits) <= {*"0123456789. "}
    assert sum(mark != " " for mark in digits) == SEEN


def test_what_is_not_full_forgets_nothing() -> None:
    """Catches forecasts while there are free slots."""
    retained = make_retained(full=False)
    assert retained.next_out() == []
    assert "free slots" in show("next", Look(), retained)
    assert "fill" in show("strip", Look(), retained)
    assert "200 tokens seen" in headline(retained, Look())


def test_many_layers_and_heads_fit_the_narrowest_terminal() -> None:
    """Catches a strip that wraps with a real model's shape."""
    lines = show("strip", Look(width=60), make_retained(layers=48, heads=32)).splitlines()
    assert len(lines) == 2 + 8
    assert all(cell_len(line) <= 60 for line in lines)


def test_a_budget_that_is_exceeded_says_so() -> None:
    """Catches a negative number of free bytes."""
    over = MemoryUse(
        weights_bytes=1, gate_bytes=0, kv_bytes=1, workspace_bytes=1, peak_bytes=2048, budget_bytes=1024,
        seen_tokens=1, full_cache_bytes=1,
    )  # fmt: skip
    assert "over by 1.0 KiB" in Look().paint(cache_panel(over, Look()))
