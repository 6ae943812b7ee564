"""Draws what a cache kept as a PNG: the memory map, and a retention matrix per layer and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimkv_cli.files import whole_file
from trimkv_cli.retained import HeadMemory, Retained
from trimkv_cli.ui.inspection import headline
from trimkv_cli.ui.inspection_page import LogBeta
from trimkv_cli.ui.look import Look
from trimkv_cli.ui.memory_map import bin_shares

_BLUE, _ORANGE, _INK = "#1a6b8a", "#d55e00", "#333333"
_BINS = 128


def draw_inspection(retained: Retained, log_beta: LogBeta, path: str, *, model: str) -> None:
    """Write the picture; a matrix shows what tokens (across) are worth as the sequence grows (down), kept ones below.

    Raises:
        UsageError: a file that cannot be written.
    """
    from matplotlib.figure import Figure

    layers, heads = len(retained.layers), len(retained.layers[0].heads)
    cell = 1.0 if heads <= 8 else 0.6
    figure = Figure(figsize=(max(6.0, heads * cell + 1), 2.4 + layers * cell), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[2.2, layers * cell])
    top, below = parts
    _draw_map(top.subplots(), retained, model)
    panels = below.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
    for layer, row in enumerate(panels):
        for head, panel in enumerate(row):
            _draw_head(panel, retained, retained.layers[layer].heads[head], log_beta[layer][head])
        row[0].set_ylabel(f"layer {layer}", fontsize=7, color=_INK)
    for head, panel in enumerate(panels[0]):
        panel.set_title(f"head {head}", fontsize=7, color=_INK)
    with whole_file(Path(path), hint="check the path given to --png") as partial:
        figure.savefig(partial, dpi=100, format="png")


def _draw_map(panel: Any, retained: Retained, model: str) -> None:
    shares = bin_shares(retained.shares(), _BINS)
    width = retained.seen / max(1, len(shares))
    panel.bar([index * width for index in range(len(shares))], shares, width=width, align="edge", color=_BLUE)
    panel.set(xlim=(0, retained.seen), ylim=(0, 1), xlabel="position", ylabel="share of heads")
    panel.set_title(f"{model}\n{headline(retained, Look(width=10**6))}", fontsize=8, color=_INK)


def _draw_head(panel: Any, retained: Retained, head: HeadMemory, log_beta: Any) -> None:
    import numpy as np

    edges = np.unique(np.linspace(0, retained.seen, min(_BINS, retained.seen) + 1).astype(int))
    ages = (edges[1:, None] - 1) - np.arange(retained.seen)[None]
    worth = np.exp(np.minimum(np.asarray(log_beta)[None], 0.0) * np.maximum(ages, 0))  # a pinned token loses nothing
    values = np.nan_to_num(np.where(ages >= 0, worth, 0.0))
    means = np.add.reduceat(values, edges[:-1], axis=1) / np.diff(edges)
    extent = (0, retained.seen, retained.seen, 0)
    panel.imshow(means, cmap="Blues", vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
    below = retained.seen * 1.06
    panel.scatter(head.positions, [below] * len(head.positions), s=2, marker="|", color=_ORANGE, clip_on=False)
    panel.set(xticks=[], yticks=[], xlim=(0, retained.seen), ylim=(retained.seen * 1.1, 0))
