"""`trimkv summarize`: read documents of any length through the bounded cache, and say what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer

from trimkv_cli.commands.options import Ascii, Encoding, Json, Live, Output, Quiet, Stats, Stream, Think, with_options
from trimkv_cli.commands.summarize.output import How, Inputs, Summaries, combined
from trimkv_cli.commands.summarize.texts import TL_DR, Format, Wish
from trimkv_cli.errors import PartialFailure, UsageError
from trimkv_cli.loading.options import EngineOptions, SamplingOptions


@with_options(engine=EngineOptions, sampling=SamplingOptions)
def summarize(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help='Text, Markdown, source, HTML or PDF; globs; "-" for stdin.'),
    ],
    *,
    focus: Annotated[str | None, typer.Option("--focus", help="Tell only what concerns this.", metavar="TEXT")] = None,
    length: Annotated[
        str | None, typer.Option("--length", help="short, medium, long, or about so many words.", metavar="LENGTH")
    ] = None,
    format: Annotated[Format | None, typer.Option("--format", help="json: one object a file, {input, points}.")] = None,
    combine: Annotated[bool, typer.Option("--combine/--no-combine", help="One summary of all files together.")] = False,
    save_cache: Annotated[
        str | None, typer.Option("--save-cache", help="Keep what was read, for trimkv ask --cache.", metavar="KV")
    ] = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw/--no-raw", help='For models without a chat template: put "TL;DR:" under the text, to be continued.'
        ),
    ] = False,
    encoding: Encoding = None,
    think: Think = None,
    json: Json = False,
    output: Output = None,
    stream: Stream = True,
    quiet: Quiet = False,
    stats: Stats = False,
    live: Live = None,
    ascii_only: Ascii = False,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Summarize documents in one pass each; memory stays the same however long they are.

    trimkv summarize report.pdf

    trimkv summarize 'chapters/*.md' --format bullets --length short

    trimkv summarize minutes/*.txt --combine --focus "what was decided"

    trimkv summarize chapters/*.txt --json -o summaries.jsonl

    trimkv summarize report.txt --save-cache report.kv

    Several files are read side by side; each summary stands under its name, in the order given. A file that cannot be
    read does not stop the others (exit 3). A text with more tokens than the model has positions is refused (exit 4)
    unless --on-overflow says what to do: map-reduce summarizes it part by part and then the summaries, rebase reads
    it in one pass and gives what is kept new positions. Nothing is ever cut off.
    """
    from trimkv_cli.commands.documents import Reader, expand

    how = How(
        wish=Wish(format=format, length=length, focus=focus),
        combine=combine,
        json=json,
        stream=stream,
        stats=stats,
        quiet=quiet,
        think=think,
        raw=raw,
        save_cache=save_cache,
        live=live,
        ascii_only=ascii_only,
        engine=engine,
    )
    names = expand(files)
    _check(names, how)
    reader = Reader(encoding=encoding, quiet=quiet)
    _run(combined(names, reader) if combine else Inputs.of(names, reader), how, sampling, output)


def _check(names: Sequence[str], how: How) -> None:
    from trimkv_cli.commands.answers import check_place

    if how.raw and how.wish != Wish():
        raise UsageError("--raw asks for nothing but a summary", hint="leave out --focus, --length and --format")
    if how.raw and how.save_cache is not None:
        raise UsageError("--save-cache keeps what messages go on with", hint="leave out --raw, or --save-cache")
    if how.json and how.wish.format == "json":
        raise UsageError("--json and --format json are both given", hint="--format json prints the points alone")
    if how.save_cache is None:
        return
    if len(names) > 1 and not how.combine:
        raise UsageError(
            "--save-cache keeps one reading", hint="run trimkv summarize once for each file, or --combine them"
        )
    if how.engine.on_overflow == "map-reduce":
        raise UsageError(
            "--save-cache keeps one reading, and --on-overflow map-reduce reads in parts", hint="--on-overflow rebase"
        )
    check_place(how.save_cache)


def _run(inputs: Inputs, how: How, sampling: SamplingOptions, output: str | None) -> None:
    from trimkv_cli.commands.answers import open_engine
    from trimkv_cli.commands.memory import check_budget
    from trimkv_cli.commands.prompts import draw_seed, needs, open_answer
    from trimkv_cli.commands.summarize.pool import Task

    map_reduce = how.engine.on_overflow == "map-reduce"
    options = replace(how.engine, on_overflow="error") if map_reduce else how.engine
    if len(inputs.names) == 1 and not map_reduce:
        options = replace(options, max_inflight=1)
    instead = '--raw puts "TL;DR:" under the text'
    llm = open_engine(options, quiet=how.quiet, check=needs(raw=how.raw, instead=instead))
    task = Task(
        instruction=TL_DR if how.raw else how.wish.instruction(),
        raw=how.raw,
        params=draw_seed(sampling).resolve(llm.facts.sampling_defaults),
        max_tokens_said=sampling.max_tokens is not None,
        think=how.think,
        map_reduce=map_reduce,
    )
    with open_answer(output) as writer:
        failed = Summaries(llm, inputs, writer, how).write(task)
    if failed and inputs.total == 1:
        raise failed[0]
    if failed:
        raise PartialFailure(
            f"{len(failed)} of {inputs.total} files failed", hint="each is named above; the others are summarized"
        )
    check_budget(llm)
