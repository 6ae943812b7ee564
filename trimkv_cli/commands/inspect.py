"""`trimkv inspect`: what the cache kept of a prompt and its answer, per layer and KV head."""

from __future__ import annotations

import json as json_module
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from trimkv_cli.commands.documents import Reader
from trimkv_cli.commands.inspect_output import Findings, Output, check_places
from trimkv_cli.commands.options import (
    Ascii,
    Color,
    Encoding,
    Json,
    Quiet,
    Raw,
    SpecialTokens,
    System,
    SystemFile,
    Think,
    with_options,
)
from trimkv_cli.engine.options import EngineOptions, SamplingOptions
from trimkv_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine


@with_options(engine=EngineOptions, sampling=SamplingOptions)
def inspect(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; text piped into stdin is appended.")] = None,
    *,
    file: Annotated[
        list[str] | None,
        typer.Option("-f", "--file", help="Append a text, HTML or PDF file; may be given again.", metavar="FILE"),
    ] = None,
    prompt_token_ids: Annotated[
        str | None, typer.Option("--prompt-token-ids", help="A JSON list of token ids instead.", metavar="FILE.json")
    ] = None,
    cache: Annotated[
        str | None, typer.Option("--cache", help="What summarize --save-cache kept, instead of a prompt.", metavar="KV")
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
    encoding: Encoding = None,
    think: Think = None,
    raw: Raw = False,
    special_tokens: SpecialTokens = False,
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

    trimkv inspect --cache report.kv --html report.html

    The last token of an answer is never fed, so prompt + N − 1 tokens are seen. --json prints
    {"seen", "kept": [layer][head][positions], "log_beta": [layer][head][seen], "output_token_ids"}.
    The page of --html needs no network and no other file. Of --cache the scores of what was let go are not known.
    """
    given = {"a prompt": prompt or file, "--prompt-token-ids": prompt_token_ids, "--cache": cache}
    several = [name for name, value in given.items() if value]
    if len(several) > 1:
        raise UsageError(f"{' and '.join(several)} are given together", hint="give one of them")
    check_places(html, png, svg)

    from trimkv_cli.commands.answers import open_engine
    from trimkv_cli.commands.memory_report import check_budget
    from trimkv_cli.commands.prompts import check_raw, gather, names_tokens, needs, read_system, render

    reader = Reader(encoding=encoding, quiet=quiet)
    ids = _read_ids(prompt_token_ids, reader) if prompt_token_ids is not None else None
    system_text = read_system(system, system_file, reader)
    check_raw(raw=raw, system=system_text, special_tokens=special_tokens)
    user = gather(prompt, file or [], reader) if ids is None and cache is None else ""
    check = needs(raw=raw) if ids is None and cache is None else None
    llm = open_engine(replace(engine, max_inflight=1), quiet=quiet, check=check)
    if cache is not None:
        findings = _of_cache(llm, cache)
    else:
        if ids is None:
            names_tokens(llm.text, user, raw=raw, special_tokens=special_tokens)
            ids = render(
                llm.text, user, system=system_text, raw=raw, think=think, special_tokens=special_tokens
            ).token_ids
        findings = _of_answer(llm, ids, sampling, quiet=quiet)
    findings.show(Output(json=json, html=html, png=png, svg=svg, colour=color, ascii_only=ascii_only, quiet=quiet), llm)
    check_budget(llm)


def _of_answer(llm: Engine, ids: tuple[int, ...], sampling: SamplingOptions, *, quiet: bool) -> Findings:
    """Answer a prompt and look at what its row holds then."""
    from trimkv_cli.commands.answers import answer, within_room
    from trimkv_cli.engine.request import Request

    params = sampling.resolve(llm.facts.sampling_defaults)
    request = Request(id="inspect", prompt_token_ids=ids, params=params, keep=True)
    request = within_room(llm, request, said=sampling.max_tokens is not None, quiet=quiet)
    llm.check(request)
    llm.start_trace()
    finished = answer(llm, request)
    return Findings.of(llm, request.id, log_beta=llm.traced_log_beta(), output_token_ids=finished.token_ids)


def _of_cache(llm: Engine, path: str) -> Findings:
    """Look at what a saved read holds."""
    from trimkv_cli.commands.saved_reads import restore_read

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
