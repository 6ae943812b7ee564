"""Tables and the picture of the records beside llama.cpp: decode speed against what was read before.

python -m bench.llama_table draws the picture anew; the tables are written by `bench.readme`. Needs the extra `plot`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_RESULTS = _ROOT / "kernels" / "bench" / "results"
_PICTURE = _ROOT / "examples" / "decode.svg"
_BESIDE_HF = "smollm2-unpacked-cpu.json"  # trimkv and transformers, both in fp32
_HEADLINE = "smollm2"
_Row = dict[str, Any]


def llama_rows(results: Path) -> Iterator[tuple[str, str]]:
    """Yield the README's lines, name and value, once they were measured."""
    rows = _rows(results, _HEADLINE, threads=1)
    if not rows:
        return
    told = [(context, _pair(rows, context, 1)) for context in (512, 2048, 7500)]
    for context, (own, other) in told:
        name = f"SmolLM2-135M Q4_1, M = 256, one thread: decode after {context:,} tokens, beside llama.cpp at its best"
        yield name if context == told[0][0] else f"… after {context:,}", _beside(own, other, "decode_tps")
    (_, first), (_, last) = told[0], told[-1]
    value = f"{_beside(*first, 'prefill_tps')}; {_beside(*last, 'prefill_tps')}"
    yield f"… reading a prompt of {told[0][0]:,} and of {told[-1][0]:,} tokens", value
    yield "… 8 sequences of 2,048 tokens together", _beside(*_pair(rows, 2048, 8), "decode_tps")
    if both := _rows(results, _HEADLINE, threads=2):
        value = "; ".join(_beside(*_pair(both, context, 1), "decode_tps") for context in (512, 2048))
        yield "… two threads: decode after 512 and 2,048", value


def llama_tables(results: Path) -> str:
    """Return a table for each file and number of threads, in Markdown."""
    found = sorted({(path.name.split("-")[2], _read(path)["threads"]) for path in _paths(results, "*")})
    return "\n\n".join("\n".join(_table(results, model, threads)) for model, threads in found)


def _table(results: Path, model: str, threads: int) -> Iterator[str]:
    record = _read(_paths(results, model, threads)[0])
    yield (
        f"| {record['file']}, {_threads(threads)}, tokens per second | decode: trimkv | M ≥ length | llama.cpp | "
        "| prefill: trimkv | M ≥ length | llama.cpp | |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    rows = _rows(results, model, threads=threads)
    for context, count in sorted({(row["context"], row["rows"]) for row in rows}, key=lambda case: case[::-1]):
        own, other = _pair(rows, context, count)
        whole = next((row for row in rows if _is(row, "trimkv", context, count) and row["keeps_all"]), None)
        speeds = []
        for kind in ("decode_tps", "prefill_tps"):
            full = "" if whole is None else f"{whole[kind]:,.0f}"
            speeds.append(f"{own[kind]:,.0f} | {full} | {other[kind]:,.0f} | × {own[kind] / other[kind]:.2f}")
        settings = f"flash attention {other['flash_attention']}, {other['cache_k']}/{other['cache_v']}"
        many = "" if count == 1 else f", {count} sequences together"
        yield f"| {context:,} tokens{many}; llama.cpp: {settings} | {' | '.join(speeds)} |"


def _pair(rows: list[_Row], context: int, count: int) -> tuple[_Row, _Row]:
    own = next(row for row in rows if _is(row, "trimkv", context, count) and not row["keeps_all"])
    return own, next(row for row in rows if _is(row, "llama.cpp", context, count))


def _is(row: _Row, engine: str, context: int, count: int) -> bool:
    return bool(row["engine"] == engine and (row["context"], row["rows"]) == (context, count))


def _beside(own: _Row, other: _Row, kind: str) -> str:
    return f"{own[kind]:,.0f} and {other[kind]:,.0f} tok/s (× {own[kind] / other[kind]:.1f})"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _rows(results: Path, model: str, *, threads: int) -> list[_Row]:
    return [row for path in _paths(results, model, threads) for row in _read(path)["rows"]]


def _paths(results: Path, model: str, threads: int | None = None) -> list[Path]:
    paths = sorted(results.glob(f"against-llama-{model}-*.json"))
    return [path for path in paths if threads in (None, _read(path)["threads"])]


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_bytes())
    return record


def draw(results: Path, picture: Path) -> None:
    """Draw decode speed against context: a line for each engine."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "trimkv"
    rows = _rows(results, _HEADLINE, threads=1)
    beside = _read(results / _BESIDE_HF)["rows"]
    lines = {
        "trimkv, M = 256": [row for row in rows if row["engine"] == "trimkv" and not row["keeps_all"]],
        "trimkv, nothing evicted": [row for row in rows if row["engine"] == "trimkv" and row["keeps_all"]],
        "llama.cpp at its best": [row for row in rows if row["engine"] == "llama.cpp"],
        "transformers, fp32": [row for row in beside if row["engine"] == "hf"],
    }
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for name, found in lines.items():
        points = sorted((row["context"], row["decode_tps"]) for row in found if row["rows"] == 1)
        width = 2.5 if name == "trimkv, M = 256" else 1.2
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, linewidth=width)
    axes.set(xlabel="tokens read before", ylabel="tokens per second", ylim=(0, None))
    axes.set_title("SmolLM2-135M-Instruct Q4_1, one CPU thread", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    draw(_RESULTS, _PICTURE)
