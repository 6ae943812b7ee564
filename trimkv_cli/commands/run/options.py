"""Options of `trimkv run`, read as far as that needs no file and no model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trimkv_cli.commands.options import ENCODING, OUTPUT, QUIET, SPECIAL_TOKENS, THINK
from trimkv_cli.errors import UsageError
from trimkv_cli.settings import option
from trimkv_cli.units import parse_duration, parse_size, read_flag

if TYPE_CHECKING:
    from trimkv_cli.jobs.progress import Limits
    from trimkv_cli.jobs.selection import Shard

InputFormat = Literal["auto", "jsonl", "text", "csv", "tsv", "parquet"]
LineOrder = Literal["completion", "input"]
EngineName = Literal["local", "ray"]
ProgressMode = Literal["auto", "plain", "json", "none"]

_FORMATS: dict[str, InputFormat] = {".txt": "text", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
_TABLES = ("csv", "tsv", "parquet")


_input = partial(option, panel="Input and output")
_ends = partial(option, panel="When to stop")
_cluster = partial(option, panel="Cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Input and output, when to stop, and what answers the lines; as typed."""

    output: str | None = OUTPUT
    input_format: InputFormat = _input("auto", "auto goes by the name; text is a prompt per line.")
    prompt_column: str | None = _input(None, "A table's column; custom_id or id beside it names rows.", "NAME")
    order: LineOrder = _input("completion", "Write results as they come, or in the input's order.")
    strict: bool = _input(False, "Refuse lines with unknown keys or another model's name.")
    retry_errors: bool = _input(False, "Try lines again that failed before.")
    overwrite: bool = _input(False, "Start anew instead of resuming an output.")
    adopt: bool = _input(False, "Resume an output although nothing says what made it.")
    shard: str = _input("1/1", "Only every N-th line, from line I on.", "I/N")
    limit: int | None = _input(None, "Stop after the first N lines.", "N", least=0)
    max_line: str = _input("16MiB", "Refuse lines longer than this.", "SIZE")
    validate: bool = _input(False, "Only check the input; load no model.")
    timeout: str | None = _ends(None, "Give up an item after this time.", "TIME")
    max_time: str | None = _ends(None, "Stop after this time; exit 75.", "TIME")
    max_errors: str | None = _ends(None, "Stop when more lines fail; a share counts from 100 lines on.", "N|P%")
    fail_fast: bool = _ends(False, "Stop at the first line that fails.")
    grace: str = _ends("10s", "For rows in flight when the job stops.", "TIME")
    engine: EngineName = _cluster("local", "This process, or a Ray cluster.")
    address: str | None = _cluster(None, "Cluster to join, or auto; default: one on this machine.", "ADDRESS")
    cpus_per_worker: int | None = _cluster(None, "Where there are no GPUs: cores per engine.", "N", least=1)
    progress: ProgressMode = option("auto", "On stderr; auto draws on a terminal only.", panel="Output")
    summary_json: str | None = option(None, "Write the final counts there.", "FILE", panel="Output")
    encoding: str | None = ENCODING
    special_tokens: bool = SPECIAL_TOKENS
    think: bool | None = THINK
    quiet: bool = QUIET


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """One run: what was typed, and what it means."""

    flags: RunOptions
    source: str
    output: str
    format: InputFormat
    max_line_bytes: int
    shard: Shard
    limits: Limits

    @classmethod
    def of(cls, source: str, flags: RunOptions) -> JobOptions:
        """Read what was typed, as far as that needs no file and no model.

        Raises:
            UsageError: values that make no sense, or contradict each other.
        """
        from trimkv_cli.jobs.selection import parse_shard

        choices = cls(
            flags=flags,
            source=source,
            output=flags.output or "-",
            format=read_format(source, flags.input_format, flags.prompt_column),
            max_line_bytes=read_line_bytes(flags.max_line),
            limits=read_limits(flags),
            shard=parse_shard(flags.shard),
        )
        check_together(choices)
        return choices

    @property
    def is_text(self) -> bool:
        """Say whether a line is a prompt and nothing else."""
        return self.format != "jsonl"


def read_limits(flags: RunOptions) -> Limits:
    """Turn limits as typed into numbers.

    Raises:
        UsageError: one of them makes no sense.
    """
    from trimkv_cli.jobs.progress import ErrorLimit, Limits, parse_error_limit

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


def check_together(choices: JobOptions) -> None:
    """Refuse flags that contradict each other.

    Raises:
        UsageError: naming them.
    """
    flags = choices.flags
    if flags.overwrite and (flags.adopt or flags.retry_errors):
        raise UsageError("--overwrite leaves nothing to go on with", hint="leave out --adopt and --retry-errors")
    if choices.output == "-" and (flags.adopt or flags.retry_errors):
        raise UsageError("stdout holds nothing to go on with", hint="-o FILE")
    if flags.order == "input" and flags.retry_errors:
        raise UsageError("what is tried again comes last, out of the input's order", hint="--order completion")
    if flags.engine == "local" and (flags.address or flags.cpus_per_worker):
        raise UsageError("--address and --cpus-per-worker are for a cluster", hint="--engine ray")
    if choices.limits.fail_fast and (choices.limits.errors.count or choices.limits.errors.percent) is not None:
        raise UsageError("--fail-fast is --max-errors 0", hint="give one of the two")


def _positive(flag: str, text: str) -> float:
    seconds = read_flag(flag, text, parse_duration)
    if seconds <= 0:
        raise UsageError(f"{flag} {text} leaves no time at all", hint=f"{flag} 60s")
    return seconds
