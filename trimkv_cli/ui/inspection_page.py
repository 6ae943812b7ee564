"""Writes what a cache kept as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from trimkv_cli import __version__
from trimkv_cli.events import MemoryUse
from trimkv_cli.retained import Retained
from trimkv_cli.ui.inspection import headline
from trimkv_cli.ui.look import Look
from trimkv_cli.ui.plain import neutralise

LogBeta = Sequence[Sequence[Sequence[float]]]  # [layer][head][position]


def inspection_page(
    retained: Retained,
    log_beta: LogBeta,
    pieces: Sequence[str],
    memory: MemoryUse,
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
    facts = Look(width=10**6).join(
        [neutralise(model), f"gates {neutralise(gates)}", headline(retained, Look(width=10**6))]
    )
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"What the cache kept: {neutralise(model)}"),
        headline=escape(facts),
        version=__version__,
        style=style,
        style_hash=_source_hash(style),
        script=script,
        script_hash=_source_hash(script),
        data=_as_script(_data(retained, log_beta, pieces, memory, prompt_tokens)),
    )


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
    return _replaced(json.dumps(value, separators=(",", ":"), ensure_ascii=False), (("<", "\\u003c"), (">", "\\u003e")))


def _replaced(text: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text
