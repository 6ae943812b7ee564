"""`trimkv ask`: one prompt, one answer; the verb for pipelines."""

from __future__ import annotations

import json as json_module
from dataclasses import replace
from typing import Annotated

import typer

from trimkv_cli.commands.options import (
    Json,
    Live,
    NoStream,
    Output,
    Quiet,
    Raw,
    Stats,
    System,
    SystemFile,
    Think,
    with_options,
)
from trimkv_cli.engine.options import EngineOptions, SamplingOptions
from trimkv_cli.errors import UsageError


@with_options(engine=EngineOptions, sampling=SamplingOptions)
def ask(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; text piped into stdin is appended.")] = None,
    *,
    file: Annotated[list[str] | None, typer.Option("-f", "--file", help="Append a text file.", metavar="FILE")] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache", help="Ask about what summarize --save-cache read, without reading again.", metavar="KV"
        ),
    ] = None,
    system: System = None,
    system_file: SystemFile = None,
    think: Think = None,
    raw: Raw = False,
    json: Json = False,
    output: Output = None,
    no_stream: NoStream = False,
    quiet: Quiet = False,
    stats: Stats = False,
    live: Live = None,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Answer one prompt; stdout carries the answer and nothing else.

    trimkv ask "Why is the sky blue?"

    git diff | trimkv ask "Write a commit message for this change" | git commit -F -

    trimkv ask -f notes.txt "What is decided, and by whom?" --json

    trimkv ask --cache report.kv "Which risks does it name?"
    """
    if cache is not None and (raw or system is not None or system_file is not None):
        raise UsageError("--cache goes on with a conversation that has begun", hint="leave out --raw and --system")

    from trimkv_cli.commands.prompts import gather, read_system

    user, system_text = gather(prompt, file or []), read_system(system, system_file)

    from trimkv_cli.commands.answers import answer, open_engine, print_stats, say_if_cut, to_completion, within_room
    from trimkv_cli.commands.prompts import draw_seed, open_answer, render
    from trimkv_cli.commands.saved_reads import next_turn
    from trimkv_cli.engine.request import Request
    from trimkv_cli.ui.live import token_counter

    options = replace(engine, max_inflight=1)
    llm = open_engine(options, quiet=quiet)
    params = draw_seed(sampling).resolve(llm.facts.sampling_defaults)
    if cache is not None:
        request = next_turn(llm, cache, user, params=params, think=think)
    else:
        rendered = render(llm.text, user, system=system_text, raw=raw, think=think)
        request = Request(
            id="ask",
            prompt_token_ids=rendered.token_ids,
            prefix_len=rendered.prefix_len,
            params=params,
            keep=True,
        )
    request = within_room(llm, request, said=sampling.max_tokens is not None, quiet=quiet)
    llm.check(request)
    with open_answer(output) as writer, token_counter(wanted=live) as count:
        streaming = not (json or no_stream)

        def show(piece: str) -> None:
            count(piece)
            if streaming:
                writer.push(piece)

        finished = answer(llm, request, show)
        if not streaming:
            writer.push(json_module.dumps(to_completion(llm, finished, options)) if json else finished.text)
        writer.close()
    if not quiet:
        say_if_cut(finished)
    if stats:
        print_stats(llm, finished)
