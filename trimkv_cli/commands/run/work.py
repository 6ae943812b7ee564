"""A batch job put together: input, earlier output, backend, and what is said about it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from trimkv_cli.commands.memory import watch
from trimkv_cli.commands.run.options import JobOptions, RunOptions
from trimkv_cli.errors import ModelError
from trimkv_cli.files import whole_file
from trimkv_cli.jobs.job import Backend, BackendFacts, Job, LocalBackend
from trimkv_cli.jobs.lines import BadLine, Item, Rules
from trimkv_cli.jobs.outputs import Output
from trimkv_cli.jobs.progress import Stop, Summary, stopped_by_signals
from trimkv_cli.jobs.reading import LineReader, TableReader, begins_with_messages, open_input
from trimkv_cli.jobs.records import Recorder
from trimkv_cli.jobs.requests import check_sizes
from trimkv_cli.jobs.resuming import (
    CHOSEN,
    check_fingerprint,
    drop_failures,
    hash_all,
    job_fingerprint,
    locked,
    remembering,
    start_anew,
)
from trimkv_cli.jobs.selection import Earlier, Selection, parse_lines
from trimkv_cli.jobs.writing import Writer, check_output, is_resumable, open_output
from trimkv_cli.loading.options import EngineOptions, SamplingOptions
from trimkv_cli.loading.sources import Source, find_here, model_names
from trimkv_cli.streams import say_if_nothing_comes
from trimkv_cli.ui.live import Lines, Watch, drawn_line, may_move, print_line
from trimkv_cli.ui.panel import Jobs
from trimkv_cli.ui.plain import neutralise, print_note, print_warning

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine
    from trimkv_cli.engine.text import Text


# What a plan may decide by itself, and a resumed job takes as it was decided before.
_SOLVED: dict[str, Callable[[str], Any]] = {
    "kv_budget": str,
    "prefill_chunk": int,
    "dtype": str,
    "kv_dtype": str,
    "quantize": str,
}

_UNSEEN = "how long prompts are, what its chat template takes, and whether it reasons"
_UNSEEN_FROM_AFAR = f"token ids, max_tokens, {_UNSEEN} (its files are not here)"


def answer_lines(choices: JobOptions, options: EngineOptions, sampling: SamplingOptions) -> Summary:
    """Run the job; what does not need the model is checked before it is loaded."""
    stream = _open(choices)
    check_output(choices.output, stream)
    if not is_resumable(choices.output):
        return _Run(choices, options, sampling).go(stream)
    path = Path(choices.output)
    with locked(path):
        if choices.flags.overwrite:
            return _Run(choices, options, sampling, Output(path=path)).go(stream)
        output = Output.taken_up(path, adopt=choices.flags.adopt)
        if output.before is not None:
            stream = output.same_input(stream)
            options = as_before(options, output.before.fingerprint)
        return _Run(choices, options, sampling, output).go(stream)


def check_lines(choices: JobOptions, options: EngineOptions, sampling: SamplingOptions) -> Summary:
    """Print every problem as `INPUT:LINE: what`, like a compiler."""
    summary = Summary()
    reader = _reader(choices, _open(choices))
    source = find_here(options)
    rules = _rules(choices, sampling, model_names(options, source))
    selection = Selection(limit=choices.flags.limit, shard=choices.shard)
    for parsed in (_within(each, source, options) for each in parse_lines(reader, rules, selection)):
        if isinstance(parsed, BadLine):
            summary.bad += 1
            for problem in (parsed.message, *parsed.further):
                message = " ".join(problem.splitlines())  # it may quote a key
                print(neutralise(f"{choices.source}:{parsed.line}: {message}"))
        else:
            summary.done += 1
            summary.count_warnings(parsed)
    if not choices.flags.quiet:
        print_note(summary.verdict(blank_lines=reader.blank_lines))
        print_note(f"not checked without the model: {_UNSEEN if source is not None else _UNSEEN_FROM_AFAR}")
    _write_summary(choices, summary, reader.blank_lines)
    return summary


def _within(parsed: Item | BadLine, source: Source | None, options: EngineOptions) -> Item | BadLine:
    """Refuse what the model's sizes show to be wrong, where these are known."""
    if source is None or isinstance(parsed, BadLine):
        return parsed
    positions = None if options.on_overflow == "rebase" else options.context or source.spec.max_positions
    return check_sizes(parsed, vocab_size=source.spec.vocab_size, positions=positions)


@dataclass(frozen=True, slots=True)
class _Run:
    """One run; an `output` that can be read again has a sidecar, and may hold answers of an earlier run."""

    choices: JobOptions
    options: EngineOptions
    sampling: SamplingOptions
    output: Output | None = None

    def go(self, stream: BinaryIO) -> Summary:
        """Load what answers, prepare the output, and run."""
        check = partial(check_template, stream, thinks=self.sampling.think_budget is not None)
        with closing(open_backend(self.choices, self.options, check)) as backend:
            for message in backend.facts.warnings:
                print_warning(message)
            names = model_names(self.options, find_here(self.options))
            rules = _rules(self.choices, self.sampling, names, backend.facts)
            if self.output is not None:
                stream = self._prepare(self.output, stream, backend.facts, rules)
            with open_output(self.choices.output) as output:
                return self._work(backend, rules, stream, Writer(output, order=self.choices.flags.order))

    def _prepare(self, output: Output, stream: BinaryIO, facts: BackendFacts, rules: Rules) -> BinaryIO:
        """Make sure that the output may be gone on with, and write what it will be known by."""
        fingerprint = job_fingerprint(
            facts.fingerprint,
            rules,
            template=facts.template,
            choices={name: getattr(self.options, name) for name in CHOSEN},
            prompt_column=self.choices.flags.prompt_column,
        )
        if output.before is not None:
            check_fingerprint(output.path, output.before.fingerprint, fingerprint)
        if self.choices.flags.overwrite:
            start_anew(output.path)
        if self.choices.flags.retry_errors and output.earlier.failures:
            drop_failures(output.path)
        covered = output.claim(fingerprint)
        if self.choices.format == "parquet":
            return hash_all(stream, covered)
        return remembering(stream, covered)

    def _work(self, backend: Backend, rules: Rules, stream: BinaryIO, writer: Writer) -> Summary:
        choices, summary, stop = self.choices, Summary(), Stop()
        reader = _reader(choices, stream)
        earlier = Earlier() if self.output is None else self.output.earlier
        selection = Selection(
            limit=choices.flags.limit,
            shard=choices.shard,
            earlier=earlier,
            retry_errors=choices.flags.retry_errors,
            in_order=choices.flags.order == "input" and earlier.records > 0,
        )
        job = Job(
            lines=parse_lines(reader, rules, selection, summary),
            sink=writer,
            recorder=_recorder(backend, self.options, rules),
            summary=summary,
            limits=choices.limits,
            stop=stop,
        )
        try:
            with stopped_by_signals(stop), _progress(choices, backend, summary) as shown:
                backend.run(replace(job, progress=lambda _: shown.tick()))
        finally:
            if backend.memory is not None:
                summary.note_memory(backend.memory())
            if not choices.flags.quiet:
                print_note(summary.report(blank_lines=reader.blank_lines))
                _say_memory(backend)
            _write_summary(choices, summary, reader.blank_lines)
        return summary


def as_before(options: EngineOptions, fingerprint: Mapping[str, str]) -> EngineOptions:
    """Fill in the sizes that an earlier plan chose, where the user leaves them open."""
    known = {name: read for name, read in _SOLVED.items() if hasattr(options, name) and name in fingerprint}
    chosen = {name: read(fingerprint[name]) for name, read in known.items() if getattr(options, name) in (None, "auto")}
    return replace(options, **chosen)


def open_backend(
    choices: JobOptions, options: EngineOptions, check: Callable[[Text | None], None] | None = None
) -> Backend:
    """Load what answers the lines: an engine here, or workers on a cluster.

    Raises:
        TrimkvError: as `load_engine` does, or there is no cluster.
    """
    if choices.flags.engine == "ray":
        return open_cluster(choices.flags, options)
    from trimkv_cli.commands.answers import open_engine

    engine = open_engine(options, quiet=choices.flags.quiet, check=check)
    facts = replace(BackendFacts.of(engine), warnings=())  # open_engine has said them
    return LocalBackend(engine, facts, partial(_memory, engine, options.budget))


def check_template(stream: BinaryIO, text: Text | None, *, thinks: bool) -> None:
    """Refuse a job that begins with messages, before weights are read for it, where no template can render them.

    Raises:
        ModelError: the model has no chat template, or one with a bug.
        UsageError: its reasoning has a budget, and it knows none.
    """
    if text is None:
        return
    if thinks:
        text.check_thinking()
    try:
        text.template.check(instead='lines with "prompt" need no template')
    except ModelError:
        if begins_with_messages(stream):
            raise


def _open(choices: JobOptions) -> BinaryIO:
    """Open the input as UTF-8, whatever its lines are written in; a Parquet file's text is always that."""
    if choices.source == "-" and not choices.flags.quiet:
        say_if_nothing_comes(print_note)
    return open_input(choices.source, encoding=None if choices.format == "parquet" else choices.flags.encoding)


def _reader(choices: JobOptions, stream: BinaryIO) -> LineReader | TableReader:
    if choices.format in ("csv", "tsv", "parquet"):
        assert choices.flags.prompt_column is not None
        return TableReader(stream, choices.format, choices.flags.prompt_column, max_line_bytes=choices.max_line_bytes)
    return LineReader(stream, max_line_bytes=choices.max_line_bytes, encoding=choices.flags.encoding)


def _rules(
    choices: JobOptions,
    sampling: SamplingOptions,
    names: frozenset[str],
    facts: BackendFacts | None = None,
) -> Rules:
    return Rules(
        defaults=sampling.resolve({} if facts is None else facts.sampling_defaults),
        max_tokens_said=sampling.max_tokens is not None,
        think=choices.flags.think,
        special_tokens=choices.flags.special_tokens,
        strict=choices.flags.strict,
        text=choices.is_text,
        has_ids=choices.format != "text",
        model_names=names,
    )


def _recorder(backend: Backend, options: EngineOptions, rules: Rules) -> Recorder:
    facts = backend.facts
    return Recorder(
        model=facts.model_id,
        run_seed=rules.defaults.seed,
        kv_budget=facts.kv_budget,
        prefill_chunk=facts.prefill_chunk,
        reproducible=options.deterministic,
        memory=backend.memory,
    )


def _say_memory(backend: Backend) -> None:
    from trimkv_cli.commands.memory import memory_line

    if not isinstance(backend, LocalBackend) or backend.memory is None:
        return
    if backend.engine.facts.plan.budget_bytes is not None:
        print_note(memory_line(backend.engine))


def _memory(engine: Any, requested: str | None) -> dict[str, Any]:
    from trimkv_cli.commands.memory import budget_report, memory_report

    return {"budget": budget_report(engine, requested), "memory": memory_report(engine)}


@contextmanager
def _progress(choices: JobOptions, backend: Backend, summary: Summary) -> Iterator[Watch]:
    """Show how the job goes: on a terminal the live panel, else a line now and then, or nothing."""
    mixed = choices.output == "-" and sys.stdout.isatty()  # records would be drawn over
    if choices.flags.progress == "none" or (choices.flags.quiet and choices.flags.progress == "auto"):
        yield Watch()
    elif choices.flags.progress == "json":
        yield Lines(print_line, lambda: json.dumps(summary.as_json()))
        print_line(json.dumps(summary.as_json()))
    elif choices.flags.progress != "auto" or mixed or not may_move():
        yield Lines(print_line, summary.progress)
    elif isinstance(backend, LocalBackend):
        with watch(backend.engine, live=None, quiet=False, jobs=lambda: _jobs(summary)) as panel:
            yield panel
    else:
        with drawn_line(summary.progress) as line:
            yield line


def _jobs(summary: Summary) -> Jobs:
    return Jobs(done=summary.done, failed=summary.errors, running=summary.running)


def _write_summary(choices: JobOptions, summary: Summary, blank_lines: int) -> None:
    if choices.flags.summary_json is None:
        return
    text = json.dumps(summary.as_json(blank_lines=blank_lines), indent=2) + "\n"
    with whole_file(Path(choices.flags.summary_json)) as partial:
        partial.write_text(text, encoding="utf-8")


def open_cluster(flags: RunOptions, options: EngineOptions) -> Backend:
    """Join a cluster, or start one here, and load an engine in each worker.

    Raises:
        TrimkvError: there is no cluster, or the first worker cannot load.
    """
    from trimkv_cli.jobs.cluster import ClusterOptions, RayBackend

    place = ClusterOptions(address=flags.address, cpus_per_worker=flags.cpus_per_worker)
    return RayBackend(partial(load_for_worker, options), place)


def load_for_worker(
    options: EngineOptions, threads: int | None, sizes: Mapping[str, str] | None
) -> tuple[Engine, BackendFacts]:
    """Load an engine in a worker, which has `threads` CPUs to itself; `sizes` is the fingerprint of the first one."""
    from trimkv_cli.loading.loader import load_engine

    options = options if options.threads or threads is None else replace(options, threads=threads)
    engine = load_engine(options if sizes is None else as_before(options, sizes))
    return engine, BackendFacts.of(engine)
