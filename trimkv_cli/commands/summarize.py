"""`trimkv summarize`: read files of any length through the bounded cache, once, and say what is in them."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimkv_cli.commands.options import Json, NoStream, Output, Quiet, Stats, Think, with_options
from trimkv_cli.engine.options import EngineOptions, SamplingOptions
from trimkv_cli.errors import InputError, PartialFailure, TrimkvError, UsageError
from trimkv_cli.ui.messages import print_error
from trimkv_cli.ui.plain import AnswerWriter

if TYPE_CHECKING:
    from trimkv_cli.commands.answers import Answer
    from trimkv_cli.engine.engine import Engine

_INSTRUCTION = "Summarize the text above. Keep to what it says; list its main points."


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """What the flags said about the output."""

    json: bool
    streaming: bool
    stats: bool
    quiet: bool
    think: bool | None
    titled: bool
    several: bool
    save_cache: str | None
    engine: EngineOptions
    sampling: SamplingOptions


@with_options(engine=EngineOptions, sampling=SamplingOptions)
def summarize(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help='Text files, or "-" for stdin.')],
    *,
    save_cache: Annotated[
        str | None, typer.Option("--save-cache", help="Keep what was read, for trimkv ask --cache.", metavar="KV")
    ] = None,
    think: Think = None,
    json: Json = False,
    output: Output = None,
    no_stream: NoStream = False,
    quiet: Quiet = False,
    stats: Stats = False,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Summarize text files in one pass each; memory stays the same however long they are.

    trimkv summarize report.txt

    trimkv summarize chapters/*.txt --json -o summaries.jsonl

    trimkv summarize report.txt --save-cache report.kv

    Of several files each summary stands under its name; one that cannot be read does not stop the others (exit 3).
    """
    from trimkv_cli.commands.answers import open_engine
    from trimkv_cli.commands.prompts import draw_seed, open_answer, read_text
    from trimkv_cli.commands.saved_reads import check_place

    if save_cache is not None:
        if len(files) > 1:
            raise UsageError("--save-cache keeps one file's reading", hint="run trimkv summarize once for each file")
        check_place(save_cache)
    if len(files) == 1:
        read_text_once = read_text(files[0])  # fails before a model is loaded
        texts: Iterator[tuple[str, str | TrimkvError]] = iter([(files[0], read_text_once)])
    else:
        texts = ((name, _try_to_read(name)) for name in files)
    how = _How(
        json=json,
        streaming=not (json or no_stream),
        stats=stats,
        quiet=quiet,
        think=think,
        titled=len(files) > 1 and not json,
        several=len(files) > 1,
        save_cache=save_cache,
        engine=replace(engine, max_inflight=1),
        sampling=draw_seed(sampling),
    )
    llm = open_engine(how.engine, quiet=quiet)
    with open_answer(output) as writer:
        failed = _summarize_all(llm, texts, writer, how)
    if failed and len(files) == 1:
        raise failed[0]
    if failed:
        raise PartialFailure(f"{len(failed)} of {len(files)} files failed")


def _summarize_all(
    llm: Engine, texts: Iterator[tuple[str, str | TrimkvError]], writer: AnswerWriter, how: _How
) -> Sequence[TrimkvError]:
    failed: list[TrimkvError] = []
    for name, text in texts:
        try:
            if isinstance(text, TrimkvError):
                raise text
            if not text.strip():
                raise InputError(f"{name} is empty", hint="there is nothing in it to summarize")
            _summarize_one(llm, name, text, writer, how)
        except TrimkvError as error:
            failed.append(error)
            if how.several:
                named = error.message if name in error.message else f"{name}: {error.message}"
                print_error(named, error.hint)
    return failed


def _summarize_one(llm: Engine, name: str, text: str, writer: AnswerWriter, how: _How) -> None:
    from trimkv_cli.commands.answers import answer, print_stats, say_if_cut
    from trimkv_cli.commands.prompts import render
    from trimkv_cli.commands.saved_reads import save_read
    from trimkv_cli.engine.request import Request

    rendered = render(llm.text, f"{text}\n\n{_INSTRUCTION}", system=None, raw=False, think=how.think)
    params = how.sampling.resolve(llm.facts.sampling_defaults)
    request = Request(id=name, prompt_token_ids=rendered.token_ids, params=params, keep=True)
    llm.check(request)
    if how.titled:
        writer.push(f"## {name}\n\n")
    finished = answer(llm, request, writer.push if how.streaming else _ignore)
    if not how.streaming:
        writer.push(_record(llm, name, finished, how) if how.json else finished.text)
    writer.close()
    if how.save_cache is not None:
        save_read(llm, name, how.save_cache)
    llm.release(name)
    if not how.quiet:
        say_if_cut(finished)
    if how.stats:
        print_stats(llm, finished)


def _record(llm: Engine, name: str, finished: Answer, how: _How) -> str:
    from trimkv_cli.commands.answers import to_completion

    record: dict[str, Any] = to_completion(llm, finished, how.engine)
    return json_module.dumps({**record, "trimkv": {**record["trimkv"], "input": name}})


def _try_to_read(name: str) -> str | TrimkvError:
    from trimkv_cli.commands.prompts import read_text

    try:
        return read_text(name)
    except TrimkvError as error:
        return error


def _ignore(piece: str) -> None:
    """Show nothing before the answer is complete."""
