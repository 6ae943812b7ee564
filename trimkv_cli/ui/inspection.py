"""The report of `inspect`: on a terminal, as a page, as a PNG and as an SVG."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from io import StringIO
from pathlib import Path
from string import Template
from typing import Any

from rich.console import Console
from rich.text import Text

from trimkv_cli import __version__
from trimkv_cli.events import HeadMemory, MemoryUse, Retained
from trimkv_cli.files import whole_file
from trimkv_cli.ui.cache_panel import bin_shares, cache_panel, head_strip, layer_map, memory_map
from trimkv_cli.ui.look import Look
from trimkv_cli.ui.plain import neutralise
from trimkv_cli.ui.tokens import next_out_line, pinned_line, token_view

_SHOWN_AT_EACH_END = 300


def inspection(retained: Retained, pieces: Sequence[str], memory: MemoryUse, look: Look) -> str:
    return "\n\n".join(look.paint(part) for part in _parts(retained, pieces, memory, look))


def headline(retained: Retained, look: Look) -> str:
    slots = max(layer.slots for layer in retained.layers)
    kept = sum(len(head.positions) for _, head in retained.heads)
    share = kept / max(1, retained.seen * retained.num_heads)
    gone = sum(held == 0 for held in retained.shares())
    return look.join(
        [
            f"{retained.seen:,} tokens seen",
            f"{slots:,} slots in each of {retained.num_heads} heads",
            f"{share:.1%} is held",
            f"{gone:,} tokens are in no head",
        ]
    )


def _parts(retained: Retained, pieces: Sequence[str], memory: MemoryUse, look: Look) -> Iterator[Text]:
    yield Text(headline(retained, look), "bold")
    yield memory_map(retained, look)
    yield layer_map(retained, look)
    yield head_strip(retained, look)
    yield Text("digits: tenths of the heads that keep a token; . = none", "dim")
    yield from _text(retained, pieces, look)
    yield Text(next_out_line(retained, pieces, look))
    if pinned := pinned_line(retained, look):
        yield Text(pinned)
    yield cache_panel(memory, look)


def _text(retained: Retained, pieces: Sequence[str], look: Look) -> Iterator[Text]:
    """Show the whole text, or where it is long its two ends, and say what is left out."""
    seen, end = retained.seen, _SHOWN_AT_EACH_END
    if seen <= 2 * end:
        yield token_view(retained, pieces, look)
        return
    yield token_view(retained, pieces, look, stop=end)
    yield Text(f"({seen - 2 * end:,} tokens in between are not shown here; --html FILE shows all)", "dim")
    yield token_view(retained, pieces, look, start=seen - end)


LogBeta = Sequence[Sequence[Sequence[float]]]  # [layer][head][position]


def inspection_page(
    retained: Retained,
    pieces: Sequence[str],
    memory: MemoryUse,
    log_beta: LogBeta,
    *,
    model: str,
    gates: str,
    prompt_tokens: int,
) -> str:
    """Return the page; `pieces` are the texts of all tokens seen, of which the first `prompt_tokens` were the prompt.

    It takes about 5 bytes per token, layer and head.
    """
    folder = files("trimkv_cli.ui") / "page"
    style, script = (folder.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    look = Look(width=10**6)
    pinned = pinned_line(retained, look)
    facts = look.join(
        [neutralise(model), f"gates {neutralise(gates)}", headline(retained, look), *([pinned] if pinned else [])]
    )
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"What the cache kept: {neutralise(model)}"),
        headline=escape(facts),
        version=__version__,
        **_NOTES[retained.static],
        style=style,
        style_hash=_source_hash(style),
        script=script,
        script_hash=_source_hash(script),
        data=_as_script(_data(retained, log_beta, pieces, memory, prompt_tokens)),
    )


_NOTES = {
    False: {
        "each_cell": "Each cell: the half-life of the token's score in tokens; with ✓ the head keeps it, for about as"
        " long as the second number says (an estimate: it moves with what comes).",
        "worth": "still worth, β<sup>age</sup>",
    },
    True: {
        "each_cell": "Each cell: the token's score, which does not fade; with ✓ the head keeps it.",
        "worth": "worth, beside the others of its head",
    },
}


def _data(
    retained: Retained, log_beta: LogBeta, pieces: Sequence[str], memory: MemoryUse, prompt_tokens: int
) -> dict[str, Any]:
    values = array("f", (value for layer in log_beta for head in layer for value in head))
    for number, (_, head) in enumerate(retained.heads):  # a pinned token's score is not its gate's
        for position, value in zip(head.positions, head.log_beta, strict=True):
            values[number * retained.seen + position] = value
    return {
        "seen": retained.seen,
        "prompt_tokens": prompt_tokens,
        "layers": len(retained.layers),
        "heads": len(retained.layers[0].heads),
        "windows": [layer.window for layer in retained.layers],
        "threshold": [head.threshold for _, head in retained.heads],
        "log_beta": _base64(values.tobytes()),
        "kept": _base64(_bits(retained)),
        "next_out": retained.next_out(),
        "static": retained.static,
        "memory": asdict(memory),
        "pieces": [neutralise(piece) for piece in pieces],
    }


def _bits(retained: Retained) -> bytes:
    """Pack which (layer, head) holds which position, one bit each, lowest first."""
    bits = bytearray((retained.num_heads * retained.seen + 7) // 8)
    for number, (_, head) in enumerate(retained.heads):
        for position in head.positions:
            place = number * retained.seen + position
            bits[place >> 3] |= 1 << (place & 7)
    return bytes(bits)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _source_hash(text: str) -> str:
    """Name a style or script in the page's security policy, which lets nothing else run."""
    return f"sha256-{_base64(hashlib.sha256(text.encode()).digest())}"


def _as_script(value: dict[str, Any]) -> str:
    """Write JSON that may stand inside a script element, whatever the texts contain."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e")


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
    scores = np.asarray(log_beta)[None]
    if retained.static:
        known = scores[np.isfinite(scores)]
        least, most = (known.min(), known.max()) if len(known) else (0.0, 0.0)
        worth = np.minimum((scores - least) / ((most - least) or 1.0), 1.0) + np.zeros(ages.shape)
    else:
        worth = np.exp(np.minimum(scores, 0.0) * np.maximum(ages, 0))  # a pinned token loses nothing
    values = np.nan_to_num(np.where(ages >= 0, worth, 0.0))
    means = np.add.reduceat(values, edges[:-1], axis=1) / np.diff(edges)
    extent = (0, retained.seen, retained.seen, 0)
    panel.imshow(means, cmap="Blues", vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
    below = retained.seen * 1.06
    panel.scatter(head.positions, [below] * len(head.positions), s=2, marker="|", color=_ORANGE, clip_on=False)
    panel.set(xticks=[], yticks=[], xlim=(0, retained.seen), ylim=(retained.seen * 1.1, 0))


_FONT_FACES = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def terminal_picture(painted: str, *, title: str, width: int) -> str:
    """Return an SVG of text with colour codes; it loads no font and no other file."""
    console = Console(
        record=True, width=width, file=StringIO(), force_terminal=True, color_system="256", legacy_windows=False
    )
    console.print(Text.from_ansi(painted), soft_wrap=True)
    svg = _FONT_FACES.sub("", console.export_svg(title=title, unique_id="trimkv"))
    return svg.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")
