"""Writes what a cache kept: on the terminal, as JSON, as a page, a PNG or an SVG."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimkv_cli.errors import UsageError
from trimkv_cli.events import MemoryUse
from trimkv_cli.files import whole_file
from trimkv_cli.retained import HeadMemory, Retained
from trimkv_cli.ui.messages import print_note
from trimkv_cli.ui.plain import to_json
from trimkv_cli.units import format_size

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine
    from trimkv_cli.ui.look import ColourChoice, Look

_SVG_WIDTH = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where the flags want the findings."""

    json: bool
    html: str | None
    png: str | None
    svg: str | None
    colour: ColourChoice
    ascii_only: bool
    quiet: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What one row of the cache holds, and the texts of all tokens that it has seen."""

    retained: Retained
    kept: list[list[list[int]]]
    pieces: list[str]
    memory: MemoryUse
    log_beta: Sequence[Sequence[Sequence[float]]]  # [layer][head][position], NaN where nobody knows
    prompt_tokens: int
    output_token_ids: tuple[int, ...]

    @classmethod
    def of(
        cls,
        llm: Engine,
        request_id: str,
        *,
        log_beta: Sequence[Sequence[Sequence[float]]] | None,
        output_token_ids: tuple[int, ...],
    ) -> Findings:
        """Look at the row that a finished or restored request left; without `log_beta` only what is kept has one."""
        from trimkv_cli.commands.memory import memory_use, pieces_of

        retained, ids = llm.retained(request_id), llm.token_ids(request_id)
        return cls(
            retained=retained,
            kept=llm.kept(request_id),
            pieces=pieces_of(llm, [*ids, *output_token_ids[-1:]])[: retained.seen],
            memory=memory_use(llm, seen=retained.seen),
            log_beta=_of_kept(retained) if log_beta is None else log_beta,
            prompt_tokens=retained.seen - max(0, len(output_token_ids) - 1),
            output_token_ids=output_token_ids,
        )

    def show(self, output: Output, llm: Engine) -> None:
        """Write the findings wherever they are wanted; files take the place of the picture on the terminal."""
        if output.html is not None:
            _write(output.html, self._page(llm), "--html")
        if output.png is not None:
            from trimkv_cli.ui.inspection_picture import draw_inspection

            draw_inspection(self.retained, self.log_beta, output.png, model=llm.facts.model_id)
        if output.svg is not None:
            _write(output.svg, self._terminal(), "--svg")
        written = [path for path in (output.html, output.png, output.svg) if path is not None]
        for path in written if not output.quiet else ():
            print_note(f"wrote {path}, {format_size(Path(path).stat().st_size)}")
        if output.json:
            print(to_json(self._record()))
        elif not written:
            from trimkv_cli.ui.look import Look

            print(self._pictures(Look.of(sys.stdout, colour=output.colour, ascii_only=output.ascii_only)))

    def _record(self) -> dict[str, Any]:
        # JSON has neither NaN (gone, unknown) nor infinity (pinned).
        known = [[[x if math.isfinite(x) else None for x in head] for head in layer] for layer in self.log_beta]
        return {
            "seen": self.retained.seen,
            "kept": self.kept,
            "log_beta": known,
            "output_token_ids": list(self.output_token_ids),
        }

    def _pictures(self, look: Look) -> str:
        from trimkv_cli.ui.inspection import inspection

        return inspection(self.retained, self.pieces, self.memory, look)

    def _terminal(self) -> str:
        from trimkv_cli.ui.look import Look
        from trimkv_cli.ui.terminal_picture import terminal_picture

        painted = self._pictures(Look(width=_SVG_WIDTH, colour=True))
        return terminal_picture(painted, title="trimkv inspect", width=_SVG_WIDTH)

    def _page(self, llm: Engine) -> str:
        from trimkv_cli.ui.inspection_page import inspection_page

        return inspection_page(
            self.retained,
            self.log_beta,
            self.pieces,
            self.memory,
            model=llm.facts.model_id,
            gates=llm.facts.gate.id,
            prompt_tokens=self.prompt_tokens,
        )


def check_places(html: str | None, png: str | None, svg: str | None) -> None:
    """Refuse what could not be written before a model is loaded for it."""
    for flag, path in (("--html", html), ("--png", png), ("--svg", svg)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UsageError(f"cannot write {path}: its folder does not exist", hint=f"check the path given to {flag}")
    if png is not None and find_spec("matplotlib") is None:
        raise UsageError("--png needs matplotlib", hint="pip install 'trimkv-cli[plot]', or --html FILE needs nothing")


def _of_kept(retained: Retained) -> list[list[list[float]]]:
    """Fill in the scores of what is held, and NaN for what is gone."""
    return [[_of_head(retained.seen, head) for head in layer.heads] for layer in retained.layers]


def _of_head(seen: int, head: HeadMemory) -> list[float]:
    values = [math.nan] * seen
    for position, log_beta in zip(head.positions, head.log_beta, strict=True):
        values[position] = log_beta
    return values


def _write(path: str, text: str, flag: str) -> None:
    with whole_file(Path(path), hint=f"check the path given to {flag}") as partial:
        partial.write_text(text, encoding="utf-8", errors="replace", newline="\n")
