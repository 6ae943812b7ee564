"""`trimkv inspect`: what the cache kept of a prompt and its answer, per layer and KV head."""

from __future__ import annotations

import json as json_module
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimkv_cli.commands.options import Ascii, Color, Json, Quiet, Raw, System, SystemFile, Think, with_options
from trimkv_cli.engine.options import EngineOptions, SamplingOptions
from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.ui.messages import print_note
from trimkv_cli.ui.plain import to_json
from trimkv_cli.units import format_size

if TYPE_CHECKING:
    from trimkv_cli.commands.answers import Answer
    from trimkv_cli.engine.engine import Engine
    from trimkv_cli.ui.look import ColourChoice, Look

_SVG_WIDTH = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """Where the flags want the findings."""

    json: bool
    html: str | None
    png: str | None
    svg: str | None
    colour: ColourChoice
    ascii_only: bool
    quiet: bool


@with_options(engine=EngineOptions, sampling=SamplingOptions)
def inspect(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; text piped into stdin is appended.")] = None,
    *,
    file: Annotated[list[str] | None, typer.Option("-f", "--file", help="Append a text file.", metavar="FILE")] = None,
    prompt_token_ids: Annotated[
        str | None, typer.Option("--prompt-token-ids", help="A JSON list of token ids instead.", metavar="FILE.json")
    ] = None,
    html: Annotated[
        str | None, typer.Option("--html", help="Write a page to open in a browser instead.", metavar="FILE.html")
    ] = None,
    png: Annotated[
        str | None, typer.Option("--png", help="Write a picture instead (needs trimkv-cli[plot]).", metavar="FILE.png")
    ] = None,
    svg: Annotated[
        str | None, typer.Option("--svg", help="Write what would stand on the terminal as SVG.", metavar="FILE.svg")
    ] = None,
    system: System = None,
    system_file: SystemFile = None,
    think: Think = None,
    raw: Raw = False,
    json: Json = False,
    color: Color = "auto",
    ascii_only: Ascii = False,
    quiet: Quiet = False,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Show what each layer and KV head still holds when the answer is done, and for how much longer.

    trimkv inspect "My cat is called Zubo. What is my cat called?" --kv-budget 16

    trimkv inspect -f book.txt "Who is the thief?" --kv-budget 256 --html book.html

    trimkv inspect --kv-budget 256 --json < book.txt | jq .seen

    The last token of an answer is never fed, so prompt + N − 1 tokens are seen. --json prints
    {"seen", "kept": [layer][head][positions], "log_beta": [layer][head][seen], "output_token_ids"}.
    The page of --html needs no network and no other file.
    """
    if prompt_token_ids is not None and (prompt is not None or file):
        raise UsageError("both a prompt and --prompt-token-ids are given", hint="give one of them")
    _check_places(html, png, svg)

    from trimkv_cli.commands.answers import answer, open_engine, within_room
    from trimkv_cli.commands.prompts import gather, read_system, render
    from trimkv_cli.engine.request import Request

    ids = _read_ids(prompt_token_ids) if prompt_token_ids is not None else None
    user = gather(prompt, file or []) if ids is None else ""
    llm = open_engine(replace(engine, max_inflight=1), quiet=quiet)
    if ids is None:
        ids = render(llm.text, user, system=read_system(system, system_file), raw=raw, think=think).token_ids
    params = sampling.resolve(llm.facts.sampling_defaults)
    request = Request(id="inspect", prompt_token_ids=ids, params=params, keep=True)
    request = within_room(llm, request, said=sampling.max_tokens is not None, quiet=quiet)
    llm.check(request)
    llm.start_trace()
    finished = answer(llm, request)
    output = _Output(json=json, html=html, png=png, svg=svg, colour=color, ascii_only=ascii_only, quiet=quiet)
    _show(llm, finished, output)


def _show(llm: Engine, finished: Answer, output: _Output) -> None:
    """Write the findings wherever they are wanted; files take the place of the picture on the terminal."""
    if output.html is not None:
        _write_page(llm, finished, output.html)
    if output.png is not None:
        from trimkv_cli.ui.inspection_picture import draw_inspection

        retained = llm.retained(finished.request.id)
        draw_inspection(retained, llm.traced_log_beta(), output.png, model=llm.facts.model_id)
    if output.svg is not None:
        _write_terminal(llm, finished, output.svg)
    written = [path for path in (output.html, output.png, output.svg) if path is not None]
    for path in written if not output.quiet else ():
        print_note(f"wrote {path}, {format_size(Path(path).stat().st_size)}")
    if output.json:
        print(to_json(_record(llm, finished)))
    elif not written:
        from trimkv_cli.ui.look import Look

        look = Look.of(sys.stdout, colour=output.colour, ascii_only=output.ascii_only)
        print(_pictures(llm, finished, look))


def _record(llm: Engine, finished: Answer) -> dict[str, Any]:
    return {
        "seen": llm.seen(finished.request.id),
        "kept": llm.kept(finished.request.id),
        "log_beta": llm.traced_log_beta(),
        "output_token_ids": list(finished.token_ids),
    }


def _pictures(llm: Engine, finished: Answer, look: Look) -> str:
    from trimkv_cli.commands.memory import memory_use
    from trimkv_cli.ui.inspection import inspection

    retained = llm.retained(finished.request.id)
    return inspection(retained, _pieces(llm, finished), memory_use(llm, seen=retained.seen), look)


def _write_terminal(llm: Engine, finished: Answer, path: str) -> None:
    from trimkv_cli.ui.look import Look
    from trimkv_cli.ui.terminal_picture import terminal_picture

    look = Look(width=_SVG_WIDTH, colour=True)
    picture = terminal_picture(_pictures(llm, finished, look), title="trimkv inspect", width=_SVG_WIDTH)
    _write(path, picture, "--svg")


def _write_page(llm: Engine, finished: Answer, path: str) -> None:
    from trimkv_cli.commands.memory import memory_use
    from trimkv_cli.ui.inspection_page import inspection_page

    retained = llm.retained(finished.request.id)
    page = inspection_page(
        retained,
        llm.traced_log_beta(),
        _pieces(llm, finished),
        memory_use(llm, seen=retained.seen),
        model=llm.facts.model_id,
        gates=llm.facts.gate.id,
        prompt_tokens=len(finished.request.prompt_token_ids),
    )
    _write(path, page, "--html")


def _write(path: str, text: str, flag: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8", errors="replace", newline="\n")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", hint=f"check the path given to {flag}") from error


def _pieces(llm: Engine, finished: Answer) -> list[str]:
    """Return the texts of the tokens that were fed: all but the last."""
    from trimkv_cli.commands.memory import pieces_of

    ids = [*finished.request.prompt_token_ids, *finished.token_ids]
    return pieces_of(llm, ids)[: llm.seen(finished.request.id)]


def _check_places(html: str | None, png: str | None, svg: str | None) -> None:
    """Refuse what could not be written before a model is loaded for it."""
    for flag, path in (("--html", html), ("--png", png), ("--svg", svg)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UsageError(f"cannot write {path}: its folder does not exist", hint=f"check the path given to {flag}")
    if png is not None and find_spec("matplotlib") is None:
        raise UsageError("--png needs matplotlib", hint="pip install 'trimkv-cli[plot]', or --html FILE needs nothing")


def _read_ids(path: str) -> tuple[int, ...]:
    from trimkv_cli.commands.prompts import read_text

    try:
        ids = json_module.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}", hint="write a list of ids: [1, 2, 3]") from error
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f"{path} is not a plain list of token ids", hint="write a list of ids: [1, 2, 3]")
    return tuple(ids)
