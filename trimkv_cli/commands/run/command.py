"""`trimkv run`: answers to every line of a file, each on its own, whatever the others do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from trimkv_cli.commands.run.options import JobOptions, RunOptions
from trimkv_cli.errors import PartialFailure, Stopped, UsageError
from trimkv_cli.loading.options import EngineOptions, SamplingOptions

if TYPE_CHECKING:
    from trimkv_cli.jobs.progress import Summary

_STDOUT = "stdout cannot be resumed: -o FILE can"


def run(
    source: Annotated[str, typer.Argument(metavar="INPUT", help='JSONL, text, CSV, TSV or Parquet; "-" for stdin.')],
    *,
    flags: RunOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Answer every line of a file; one bad line never stops the others.

    trimkv run questions.jsonl -o answers.jsonl

    trimkv run prompts.txt --kv-budget 256 | jq .response.body

    A line is a request in the OpenAI batch format, or simply {"prompt": ...}, {"messages": [...]} or
    {"prompt_token_ids": [...]}, with an optional "id" and with sampling keys, which beat the flags.
    A prompt is continued as it is (its special tokens are text unless --special-tokens or "special_tokens": true says
    otherwise); messages and tools go through the model's chat template, and are always text.

    The same command resumes a job that was interrupted: lines that are answered in the output are not run again.
    """
    from trimkv_cli.commands.memory import BudgetNotHeld
    from trimkv_cli.commands.run.work import answer_lines, check_lines

    choices = JobOptions.of(source, flags)
    if engine.on_overflow == "map-reduce":
        raise UsageError("--on-overflow map-reduce is for summarize", hint="--on-overflow rebase")
    if flags.validate:
        _judge(check_lines(choices, engine, sampling), validated=True)
    else:
        summary = answer_lines(choices, engine, sampling)
        _raise_when_stopped(summary, choices)
        if summary.budget_bytes is not None and summary.over_budget:
            raise BudgetNotHeld(summary.peak_bytes or 0, summary.budget_bytes)
        _judge(summary, validated=False)


def _raise_when_stopped(summary: Summary, choices: JobOptions) -> None:
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
