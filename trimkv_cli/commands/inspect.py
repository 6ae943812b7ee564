"""`trimkv inspect`: what a cache kept, on the terminal, as JSON, as a page, a PNG or an SVG."""

from __future__ import annotations

import json as json_module
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimkv_cli.commands.options import (
    ASCII,
    COLOR,
    ENCODING,
    JSON,
    QUIET,
    RAW,
    SPECIAL_TOKENS,
    SYSTEM,
    SYSTEM_FILE,
    THINK,
)
from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.files import check_folder, whole_file
from trimkv_cli.loading.options import EngineOptions, SamplingOptions
from trimkv_cli.settings import option
from trimkv_cli.ui.look import ColourChoice, Look
from trimkv_cli.ui.plain import print_note, to_json
from trimkv_cli.units import format_size

if TYPE_CHECKING:
    from trimkv_cli.commands.documents import Reader
    from trimkv_cli.engine.engine import Engine
    from trimkv_cli.events import MemoryUse, Retained

_SVG_WIDTH = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectOptions:
    """Parts of the prompt, and where the findings go."""

    file: list[str] | None = option(None, "Append a text, HTML or PDF file; may be given again.", "FILE", short="-f")
    prompt_token_ids: str | None = option(None, "A JSON list of token ids instead.", "FILE.json")
    cache: str | None = option(None, "What summarize --save-cache kept, instead of a prompt.", "KV")
    html: str | None = option(None, "Write a page to open in a browser instead.", "FILE.html")
    png: str | None = option(None, "Write a picture instead (needs trimkv-cli[plot]).", "FILE.png")
    svg: str | None = option(None, "Write what would stand on the terminal as SVG.", "FILE.svg")
    system: str | None = SYSTEM
    system_file: str | None = SYSTEM_FILE
    encoding: str | None = ENCODING
    think: bool | None = THINK
    raw: bool = RAW
    special_tokens: bool = SPECIAL_TOKENS
    json: bool = JSON
    color: ColourChoice = COLOR
    ascii: bool = ASCII
    quiet: bool = QUIET


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

        retained, ids = llm.kept.retained(request_id), llm.kept.token_ids(request_id)
        return cls(
            retained=retained,
            kept=llm.kept.positions(request_id),
            pieces=pieces_of(llm, [*ids, *output_token_ids[-1:]])[: retained.seen],
            memory=memory_use(llm, seen=retained.seen),
            log_beta=_of_kept(retained) if log_beta is None else log_beta,
            prompt_tokens=retained.seen - max(0, len(output_token_ids) - 1),
            output_token_ids=output_token_ids,
        )

    def show(self, llm: Engine, form: InspectOptions) -> None:
        """Write the findings wherever they are wanted; files take the place of the picture on the terminal."""
        from trimkv_cli.ui.inspection import draw_inspection, inspection, inspection_page, terminal_picture

        held = (self.retained, self.pieces, self.memory)
        model = llm.facts.model_id
        if form.html is not None:
            page = inspection_page(
                *held, self.log_beta, model=model, gates=llm.facts.gate.id, prompt_tokens=self.prompt_tokens
            )
            _write(form.html, page, "--html")
        if form.png is not None:
            draw_inspection(self.retained, self.log_beta, form.png, model=model)
        if form.svg is not None:
            painted = inspection(*held, Look(width=_SVG_WIDTH, colour=True))
            _write(form.svg, terminal_picture(painted, title="trimkv inspect", width=_SVG_WIDTH), "--svg")
        written = [path for path in (form.html, form.png, form.svg) if path is not None]
        for path in written if not form.quiet else ():
            print_note(f"wrote {path}, {format_size(Path(path).stat().st_size)}")
        if form.json:
            print(to_json(self._record()))
        elif not written:
            print(inspection(*held, Look.of(sys.stdout, colour=form.color, ascii_only=form.ascii)))

    def _record(self) -> dict[str, Any]:
        # JSON has neither NaN (gone, unknown) nor infinity (pinned).
        known = [[[x if math.isfinite(x) else None for x in head] for head in layer] for layer in self.log_beta]
        return {
            "seen": self.retained.seen,
            "kept": self.kept,
            "pinned": list(self.retained.pinned()),
            "log_beta": known,
            "output_token_ids": list(self.output_token_ids),
        }


def check_places(html: str | None, png: str | None, svg: str | None) -> None:
    for flag, path in (("--html", html), ("--png", png), ("--svg", svg)):
        if path is not None:
            check_folder(path, flag)
    if png is not None and find_spec("matplotlib") is None:
        raise UsageError("--png needs matplotlib", hint="pip install 'trimkv-cli[plot]', or --html FILE needs nothing")


def _of_kept(retained: Retained) -> list[list[list[float]]]:
    """Fill in the scores of what is held, and NaN for what is gone."""
    scores = [[[math.nan] * retained.seen for _ in layer.heads] for layer in retained.layers]
    for layer, filled in zip(retained.layers, scores, strict=True):
        for head, values in zip(layer.heads, filled, strict=True):
            for position, log_beta in zip(head.positions, head.log_beta, strict=True):
                values[position] = log_beta
    return scores


def _write(path: str, text: str, flag: str) -> None:
    with whole_file(Path(path), hint=f"check the path given to {flag}") as partial:
        partial.write_text(text, encoding="utf-8", errors="replace", newline="\n")


def inspect(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; text piped into stdin is appended.")] = None,
    *,
    form: InspectOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Show what each layer and KV head still holds when the answer is done, and for how much longer.

    trimkv inspect "My cat is called Zubo. What is my cat called?" --kv-budget 16

    trimkv inspect -f book.txt "Who is the thief?" --kv-budget 256 --html book.html

    trimkv inspect --kv-budget 256 --json < book.txt | jq .seen

    trimkv inspect --cache report.kv --html report.html

    The last token of an answer is never fed, so prompt + N − 1 tokens are seen. --json prints
    {"seen", "kept": [layer][head][positions], "pinned", "log_beta": [layer][head][seen], "output_token_ids"}.
    The page of --html needs no network and no other file. Of --cache the scores of what was let go are not known.
    """
    given = {"a prompt": prompt or form.file, "--prompt-token-ids": form.prompt_token_ids, "--cache": form.cache}
    several = [name for name, value in given.items() if value]
    if len(several) > 1:
        raise UsageError(f"{' and '.join(several)} are given together", hint="give one of them")
    check_places(form.html, form.png, form.svg)

    from trimkv_cli.commands.answers import open_engine
    from trimkv_cli.commands.documents import Reader
    from trimkv_cli.commands.memory import check_budget
    from trimkv_cli.commands.prompts import check_raw, gather, names_tokens, needs, read_system, render

    reader = Reader(encoding=form.encoding, quiet=form.quiet)
    ids = _read_ids(form.prompt_token_ids, reader) if form.prompt_token_ids is not None else None
    prefix_len = 0
    system_text = read_system(form.system, form.system_file, reader)
    check_raw(raw=form.raw, system=system_text, special_tokens=form.special_tokens)
    user = gather(prompt, form.file or [], reader) if ids is None and form.cache is None else ""
    check = needs(raw=form.raw) if ids is None and form.cache is None else None
    llm = open_engine(replace(engine, max_inflight=1), quiet=form.quiet, check=check)
    if form.cache is not None:
        findings = _of_cache(llm, form.cache)
    else:
        if ids is None:
            names_tokens(llm.text, user, raw=form.raw, special_tokens=form.special_tokens)
            how: dict[str, Any] = {"raw": form.raw, "think": form.think, "special_tokens": form.special_tokens}
            rendered = render(llm.text, user, system=system_text, **how)
            ids, prefix_len = rendered.token_ids, rendered.prefix_len
        findings = _of_answer(llm, ids, prefix_len, sampling, quiet=form.quiet)
    findings.show(llm, form)
    check_budget(llm)


def _of_answer(
    llm: Engine, ids: tuple[int, ...], prefix_len: int, sampling: SamplingOptions, *, quiet: bool
) -> Findings:
    """Answer a prompt and look at what its row holds then."""
    from trimkv_cli.commands.answers import answer, within_room
    from trimkv_cli.request import Request

    params = sampling.resolve(llm.facts.sampling_defaults)
    request = Request(id="inspect", prompt_token_ids=ids, prefix_len=prefix_len, params=params, keep=True)
    request = within_room(llm, request, said=sampling.max_tokens is not None, quiet=quiet)
    llm.check(request)
    if not llm.facts.gate.compares_keys:
        llm.start_trace()
    finished = answer(llm, request)
    # Scores that move with the keys beside a token are known of what is kept alone.
    traced = None if llm.facts.gate.compares_keys else llm.traced_log_beta()
    return Findings.of(llm, request.id, log_beta=traced, output_token_ids=tuple(finished.token_ids))


def _of_cache(llm: Engine, path: str) -> Findings:
    from trimkv_cli.commands.answers import restore_read

    restore_read(llm, path)
    return Findings.of(llm, path, log_beta=None, output_token_ids=())


def _read_ids(path: str, reader: Reader) -> tuple[int, ...]:
    try:
        ids = json_module.loads(reader.text(path))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}", hint="write a list of ids: [1, 2, 3]") from error
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f"{path} is not a plain list of token ids", hint="write a list of ids: [1, 2, 3]")
    return tuple(ids)
