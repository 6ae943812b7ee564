"""Measured speed on the terminal: one line per measurement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from trimkv_cli.ui.tables import columns
from trimkv_cli.units import format_size

_HEAD = ("engine", "M", "rows", "context", "prefill tok/s", "decode tok/s", "ms/token p50", "p95", "TTFT s", "peak")


class Measured(Protocol):
    """What a line shows."""

    @property
    def engine(self) -> str: ...
    @property
    def context(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def kv_budget(self) -> int | None: ...
    @property
    def prefill_tps(self) -> float: ...
    @property
    def decode_tps(self) -> float: ...
    @property
    def ms_per_token_p50(self) -> float: ...
    @property
    def ms_per_token_p95(self) -> float: ...
    @property
    def ttft_s(self) -> float: ...
    @property
    def peak_bytes(self) -> int | None: ...


def speed_lines(rows: Sequence[Measured]) -> Iterator[str]:
    """Yield the heading and a line per measurement, in columns."""
    return columns([_HEAD, *(_cells(row) for row in rows)])


def _cells(row: Measured) -> tuple[str, ...]:
    return (
        row.engine,
        "all" if row.kv_budget is None else str(row.kv_budget),
        str(row.rows),
        f"{row.context:,}",
        f"{row.prefill_tps:,.0f}",
        f"{row.decode_tps:,.1f}",
        f"{row.ms_per_token_p50:.2f}",
        f"{row.ms_per_token_p95:.2f}",
        f"{row.ttft_s:.2f}",
        "-" if row.peak_bytes is None else format_size(row.peak_bytes),
    )
