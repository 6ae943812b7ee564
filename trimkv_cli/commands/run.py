"""`trimkv run`: answer every line of a file, each on its own, whatever the others do."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trimkv_cli.commands.options import Output, Quiet, Think, with_options
from trimkv_cli.engine.options import EngineOptions, SamplingOptions
from trimkv_cli.errors import PartialFailure, UsageError
from trimkv_cli.ui.messages import print_note
from trimkv_cli.ui.plain import neutralise
from trimkv_cli.units import parse_size

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine
    from trimkv_cli.jobs.lines import BadLine, Item, Rules
    from trimkv_cli.jobs.reading import LineReader
    from trimkv_cli.jobs.records import Recorder
    from trimkv_cli.jobs.summary import Summary


InputFormat = Literal["auto", "jsonl", "text"]
LineOrder = Literal["completion", "input"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choices:
    """What the command's own flags said."""

    source: str
    output: str
    text: bool
    order: LineOrder
    strict: bool
    overwrite: bool
    limit: int | None
    max_line_bytes: int
    quiet: bool
    think: bool | None


@with_options(engine=EngineOptions, sampling=SamplingOptions)
def run(
    source: Annotated[str, typer.Argument(metavar="INPUT", help='JSONL or text file, or "-" for stdin.')],
    *,
    output: Output = None,
    input_format: Annotated[
        InputFormat, typer.Option("--input-format", help="auto reads *.txt as one prompt per line.")
    ] = "auto",
    order: Annotated[
        LineOrder, typer.Option("--order", help="Write results as they come, or in the input's order.")
    ] = "completion",
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse lines with unknown keys or another model's name.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=0, metavar="N", help="Stop after the first N lines.")
    ] = None,
    max_line: Annotated[
        str, typer.Option("--max-line", metavar="SIZE", help="Refuse lines longer than this.")
    ] = "16MiB",
    validate: Annotated[bool, typer.Option("--validate", help="Only check the input; load no model.")] = False,
    think: Think = None,
    quiet: Quiet = False,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Answer every line of a file; one bad line never stops the others.

    trimkv run questions.jsonl -o answers.jsonl

    trimkv run prompts.txt --kv-budget 256 | jq .response.body

    A line is a request in the OpenAI batch format, or simply {"prompt": ...}, {"messages": [...]} or
    {"prompt_token_ids": [...]}, with an optional "id" and with sampling keys, which beat the flags.
    A prompt is continued as it is; messages go through the model's chat template.
    """
    choices = _Choices(
        source=source,
        output=output or "-",
        text=input_format == "text" or (input_format == "auto" and Path(source).suffix == ".txt"),
        order=order,
        strict=strict,
        overwrite=overwrite,
        limit=limit,
        max_line_bytes=_line_bytes(max_line),
        quiet=quiet,
        think=think,
    )
    summary = _validate(choices, engine, sampling) if validate else _answer(choices, engine, sampling)
    if summary.bad + summary.failed:
        raise PartialFailure(
            f"{summary.bad + summary.failed:,} of {summary.lines:,} lines failed",
            hint="trimkv run --validate lists bad lines" if summary.bad and not validate else None,
        )


def _answer(choices: _Choices, options: EngineOptions, sampling: SamplingOptions) -> Summary:
    """Run the job; what does not need the model is checked before it is loaded."""
    from trimkv_cli.commands.answers import open_engine
    from trimkv_cli.jobs.job import run_job
    from trimkv_cli.jobs.progress import PlainProgress
    from trimkv_cli.jobs.reading import LineReader, open_input
    from trimkv_cli.jobs.summary import Summary
    from trimkv_cli.jobs.writing import Writer, check_output, open_output

    stream = open_input(choices.source)
    check_output(choices.output, stream, overwrite=choices.overwrite)
    reader = LineReader(stream, max_line_bytes=choices.max_line_bytes)
    engine = open_engine(options, quiet=choices.quiet)
    rules = _rules(choices, options, sampling, engine)
    summary, recorder = Summary(), _recorder(engine, options, rules)
    progress = _silent if choices.quiet else PlainProgress(sys.stderr)
    with open_output(choices.output, overwrite=choices.overwrite) as out:
        writer = Writer(out, order=choices.order)
        try:
            run_job(engine, _parsed(reader, choices, rules), writer, recorder, summary=summary, progress=progress)
        finally:
            if not choices.quiet:
                print_note(summary.report(blank_lines=reader.blank_lines))
    return summary


def _validate(choices: _Choices, options: EngineOptions, sampling: SamplingOptions) -> Summary:
    """Print every problem as `INPUT:LINE: what`, like a compiler."""
    from trimkv_cli.jobs.lines import BadLine
    from trimkv_cli.jobs.reading import LineReader, open_input
    from trimkv_cli.jobs.summary import Summary

    summary = Summary()
    reader = LineReader(open_input(choices.source), max_line_bytes=choices.max_line_bytes)
    for parsed in _parsed(reader, choices, _rules(choices, options, sampling, None)):
        if isinstance(parsed, BadLine):
            summary.bad += 1
            message = " ".join(parsed.message.splitlines())  # it may quote a key
            print(neutralise(f"{choices.source}:{parsed.line}: {message}"))
        else:
            summary.done += 1
            summary.count_warnings(parsed)
    if not choices.quiet:
        print_note(summary.verdict(blank_lines=reader.blank_lines))
    return summary


def _parsed(reader: LineReader, choices: _Choices, rules: Rules) -> Iterable[Item | BadLine]:
    from trimkv_cli.jobs.lines import parse_lines

    return parse_lines(islice(reader, choices.limit), rules)


def _rules(choices: _Choices, options: EngineOptions, sampling: SamplingOptions, engine: Engine | None) -> Rules:
    from trimkv_cli.jobs.lines import Rules

    names = {options.model, options.profile}
    if engine is not None:
        names |= {engine.facts.model_id, engine.facts.gate.id, engine.facts.gate.base_model}
    return Rules(
        defaults=sampling.resolve({} if engine is None else engine.facts.sampling_defaults),
        think=choices.think,
        strict=choices.strict,
        text=choices.text,
        model_names=frozenset(name for name in names if name),
    )


def _recorder(engine: Engine, options: EngineOptions, rules: Rules) -> Recorder:
    from trimkv_cli.jobs.records import Recorder

    return Recorder(
        model=engine.facts.model_id,
        run_seed=rules.defaults.seed,
        kv_budget=engine.facts.plan.kv_budget,
        prefill_chunk=engine.facts.plan.prefill_chunk,
        reproducible=options.deterministic,
    )


def _silent(summary: Summary) -> None:
    """Show nothing."""


def _line_bytes(text: str) -> int:
    size = parse_size(text)
    if size < 1:
        raise UsageError(f"--max-line {text} leaves no room for a line", hint="--max-line 16MiB")
    return size
