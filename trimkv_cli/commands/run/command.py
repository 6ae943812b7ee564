"""`trimkv run`: answer every line of a file, each on its own, whatever the others do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from trimkv_cli.commands.memory import BudgetNotHeld
from trimkv_cli.commands.options import Encoding, Output, Quiet, SpecialTokens, Think, with_options
from trimkv_cli.commands.run.choices import (
    Choices,
    ClusterChoices,
    EngineName,
    InputFormat,
    LimitFlags,
    LineOrder,
    ProgressMode,
    check_together,
    read_format,
    read_limits,
    read_line_bytes,
)
from trimkv_cli.errors import PartialFailure, Stopped, UsageError
from trimkv_cli.loading.options import EngineOptions, SamplingOptions

if TYPE_CHECKING:
    from trimkv_cli.jobs.summary import Summary

_STDOUT = "stdout cannot be resumed: -o FILE can"
_INPUT, _ENDS, _CLUSTER = "Input and output", "When to stop", "Cluster"


@with_options(engine=EngineOptions, sampling=SamplingOptions)
def run(
    source: Annotated[str, typer.Argument(metavar="INPUT", help='JSONL, text, CSV, TSV or Parquet; "-" for stdin.')],
    *,
    output: Output = None,
    input_format: Annotated[
        InputFormat,
        typer.Option(
            "--input-format", help="auto goes by the name; text is a prompt per line.", rich_help_panel=_INPUT
        ),
    ] = "auto",
    prompt_column: Annotated[
        str | None,
        typer.Option(
            "--prompt-column",
            metavar="NAME",
            help="A table's column; custom_id or id beside it names rows.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    order: Annotated[
        LineOrder,
        typer.Option("--order", help="Write results as they come, or in the input's order.", rich_help_panel=_INPUT),
    ] = "completion",
    strict: Annotated[
        bool,
        typer.Option(
            "--strict/--no-strict",
            help="Refuse lines with unknown keys or another model's name.",
            rich_help_panel=_INPUT,
        ),
    ] = False,
    retry_errors: Annotated[
        bool,
        typer.Option(
            "--retry-errors/--no-retry-errors", help="Try lines again that failed before.", rich_help_panel=_INPUT
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite/--no-overwrite", help="Start anew instead of resuming an output.", rich_help_panel=_INPUT
        ),
    ] = False,
    adopt: Annotated[
        bool,
        typer.Option(
            "--adopt/--no-adopt", help="Resume an output although nothing says what made it.", rich_help_panel=_INPUT
        ),
    ] = False,
    shard: Annotated[
        str,
        typer.Option("--shard", metavar="I/N", help="Only every N-th line, from line I on.", rich_help_panel=_INPUT),
    ] = "1/1",
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=0, metavar="N", help="Stop after the first N lines.", rich_help_panel=_INPUT),
    ] = None,
    max_line: Annotated[
        str,
        typer.Option("--max-line", metavar="SIZE", help="Refuse lines longer than this.", rich_help_panel=_INPUT),
    ] = "16MiB",
    validate: Annotated[
        bool,
        typer.Option("--validate/--no-validate", help="Only check the input; load no model.", rich_help_panel=_INPUT),
    ] = False,
    timeout: Annotated[
        str | None,
        typer.Option("--timeout", metavar="TIME", help="Give up an item after this time.", rich_help_panel=_ENDS),
    ] = None,
    max_time: Annotated[
        str | None,
        typer.Option("--max-time", metavar="TIME", help="Stop after this time; exit 75.", rich_help_panel=_ENDS),
    ] = None,
    max_errors: Annotated[
        str | None,
        typer.Option(
            "--max-errors",
            metavar="N|P%",
            help="Stop when more lines fail; a share counts from 100 lines on.",
            rich_help_panel=_ENDS,
        ),
    ] = None,
    fail_fast: Annotated[
        bool,
        typer.Option("--fail-fast/--no-fail-fast", help="Stop at the first line that fails.", rich_help_panel=_ENDS),
    ] = False,
    grace: Annotated[
        str,
        typer.Option("--grace", metavar="TIME", help="For rows in flight when the job stops.", rich_help_panel=_ENDS),
    ] = "10s",
    engine_name: Annotated[
        EngineName, typer.Option("--engine", help="This process, or a Ray cluster.", rich_help_panel=_CLUSTER)
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="ADDRESS",
            help="Cluster to join, or auto; default: one on this machine.",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    cpus_per_worker: Annotated[
        int | None,
        typer.Option(
            "--cpus-per-worker",
            min=1,
            metavar="N",
            help="Where there are no GPUs: cores per engine.",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    progress: Annotated[
        ProgressMode,
        typer.Option("--progress", help="On stderr; auto draws on a terminal only.", rich_help_panel="Output"),
    ] = "auto",
    summary_json: Annotated[
        str | None,
        typer.Option("--summary-json", metavar="FILE", help="Write the final counts there.", rich_help_panel="Output"),
    ] = None,
    encoding: Encoding = None,
    special_tokens: SpecialTokens = False,
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
    A prompt is continued as it is (its special tokens are text unless --special-tokens or "special_tokens": true says
    otherwise); messages go through the model's chat template, and are always text.

    The same command resumes a job that was interrupted: lines that are answered in the output are not run again.
    """
    from trimkv_cli.commands.run.work import answer_lines, check_lines
    from trimkv_cli.jobs.selection import parse_shard

    limits = LimitFlags(timeout=timeout, max_time=max_time, grace=grace, max_errors=max_errors, fail_fast=fail_fast)
    choices = Choices(
        source=source,
        output=output or "-",
        format=read_format(source, input_format, prompt_column),
        prompt_column=prompt_column,
        order=order,
        strict=strict,
        overwrite=overwrite,
        adopt=adopt,
        retry_errors=retry_errors,
        limit=limit,
        max_line_bytes=read_line_bytes(max_line),
        quiet=quiet,
        think=think,
        encoding=encoding,
        special_tokens=special_tokens,
        progress=progress,
        summary_json=summary_json,
        limits=read_limits(limits),
        shard=parse_shard(shard),
        engine=engine_name,
        cluster=ClusterChoices(address=address, cpus_per_worker=cpus_per_worker),
    )
    check_together(choices)
    if engine.on_overflow == "map-reduce":
        raise UsageError("--on-overflow map-reduce is for summarize", hint="--on-overflow rebase")
    if validate:
        _judge(check_lines(choices, engine, sampling), validated=True)
    else:
        summary = answer_lines(choices, engine, sampling)
        _raise_when_stopped(summary, choices)
        if summary.budget_bytes is not None and summary.over_budget:
            raise BudgetNotHeld(summary.peak_bytes or 0, summary.budget_bytes)
        _judge(summary, validated=False)


def _raise_when_stopped(summary: Summary, choices: Choices) -> None:
    if summary.stopped in ("signal", "time"):
        why = "by a signal" if summary.stopped == "signal" else "by --max-time"
        resumes = "the same command resumes" if choices.output != "-" else _STDOUT
        raise Stopped(f"stopped {why} after {summary.lines:,} lines", hint=resumes)
    if summary.stopped == "errors":
        raise PartialFailure(
            f"stopped: {summary.errors:,} of {summary.lines:,} lines failed, more than allowed",
            hint="the same command goes on with the lines that are left" if choices.output != "-" else _STDOUT,
        )


def _judge(summary: Summary, *, validated: bool) -> None:
    if summary.errors:
        raise PartialFailure(
            f"{summary.errors:,} of {summary.lines:,} lines failed",
            hint="trimkv run --validate lists bad lines" if summary.bad and not validated else None,
        )
    if summary.failed_before:
        raise PartialFailure(f"{summary.failed_before:,} lines failed before", hint="--retry-errors tries them again")
