"""What `trimkv run`'s own flags said, checked as far as that needs no file and no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trimkv_cli.errors import UsageError
from trimkv_cli.units import parse_duration, parse_size, read_flag

if TYPE_CHECKING:
    from trimkv_cli.jobs.selection import Shard
    from trimkv_cli.jobs.stopping import Limits

InputFormat = Literal["auto", "jsonl", "text", "csv", "tsv", "parquet"]
LineOrder = Literal["completion", "input"]
EngineName = Literal["local", "ray"]
ProgressMode = Literal["auto", "plain", "json", "none"]

_FORMATS: dict[str, InputFormat] = {".txt": "text", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
_TABLES = ("csv", "tsv", "parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """One run, as the user wants it."""

    source: str
    output: str
    format: InputFormat
    prompt_column: str | None
    order: LineOrder
    strict: bool
    overwrite: bool
    adopt: bool
    retry_errors: bool
    limit: int | None
    max_line_bytes: int
    quiet: bool
    think: bool | None
    encoding: str | None
    special_tokens: bool
    progress: ProgressMode
    summary_json: str | None
    limits: Limits
    shard: Shard
    engine: EngineName
    cluster: ClusterChoices

    @property
    def is_text(self) -> bool:
        """Say whether a line is a prompt and nothing else."""
        return self.format != "jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterChoices:
    """Where Ray runs, and how large its workers are."""

    address: str | None = None
    cpus_per_worker: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitFlags:
    """Limits as typed."""

    timeout: str | None = None
    max_time: str | None = None
    grace: str = "10s"
    max_errors: str | None = None
    fail_fast: bool = False


def read_limits(flags: LimitFlags) -> Limits:
    """Turn limits as typed into numbers.

    Raises:
        UsageError: one of them makes no sense.
    """
    from trimkv_cli.jobs.stopping import ErrorLimit, Limits, parse_error_limit

    return Limits(
        timeout_s=None if flags.timeout is None else _positive("--timeout", flags.timeout),
        max_time_s=None if flags.max_time is None else _positive("--max-time", flags.max_time),
        grace_s=read_flag("--grace", flags.grace, parse_duration),
        errors=ErrorLimit() if flags.max_errors is None else parse_error_limit(flags.max_errors),
        fail_fast=flags.fail_fast,
    )


def read_format(source: str, asked: InputFormat, prompt_column: str | None) -> InputFormat:
    """Return what the input's lines are; auto goes by the name.

    Raises:
        UsageError: a table without a column, or a column without a table.
    """
    name = Path(source)
    name = name.with_suffix("") if name.suffix in (".gz", ".zst") else name
    found = _FORMATS.get(name.suffix, "jsonl") if asked == "auto" else asked
    if found in _TABLES and prompt_column is None:
        raise UsageError(f"{source} is a table: which column holds the prompts?", hint="--prompt-column NAME")
    if found not in _TABLES and prompt_column is not None:
        raise UsageError(
            "--prompt-column is for tables", hint="--input-format csv, or a file called *.csv, *.tsv or *.parquet"
        )
    if found == "parquet" and (source == "-" or name.suffix != Path(source).suffix):
        raise UsageError("Parquet is read from a plain file", hint="give the file's name")
    return found


def read_line_bytes(text: str) -> int:
    """Read `--max-line`.

    Raises:
        UsageError: no size, or none at all.
    """
    size = read_flag("--max-line", text, parse_size)
    if size < 1:
        raise UsageError(f"--max-line {text} leaves no room for a line", hint="--max-line 16MiB")
    return size


def check_together(choices: Choices) -> None:
    """Refuse flags that contradict each other.

    Raises:
        UsageError: naming them.
    """
    if choices.overwrite and (choices.adopt or choices.retry_errors):
        raise UsageError("--overwrite leaves nothing to go on with", hint="leave out --adopt and --retry-errors")
    if choices.output == "-" and (choices.adopt or choices.retry_errors):
        raise UsageError("stdout holds nothing to go on with", hint="-o FILE")
    if choices.order == "input" and choices.retry_errors:
        raise UsageError("what is tried again comes last, out of the input's order", hint="--order completion")
    if choices.engine == "local" and (choices.cluster.address or choices.cluster.cpus_per_worker):
        raise UsageError("--address and --cpus-per-worker are for a cluster", hint="--engine ray")
    if choices.limits.fail_fast and (choices.limits.errors.count or choices.limits.errors.percent) is not None:
        raise UsageError("--fail-fast is --max-errors 0", hint="give one of the two")


def _positive(flag: str, text: str) -> float:
    seconds = read_flag(flag, text, parse_duration)
    if seconds <= 0:
        raise UsageError(f"{flag} {text} leaves no time at all", hint=f"{flag} 60s")
    return seconds
