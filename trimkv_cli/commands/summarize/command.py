"""`trimkv summarize`: documents of any length read through the bounded cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimkv_cli.commands.options import ASCII, ENCODING, JSON, LIVE, OUTPUT, QUIET, STATS, STREAM, THINK
from trimkv_cli.commands.summarize.texts import TL_DR, SummaryStyle, as_json, joined
from trimkv_cli.errors import InputError, PartialFailure, TrimkvError, UsageError
from trimkv_cli.files import check_folder
from trimkv_cli.loading.options import EngineOptions, SamplingOptions
from trimkv_cli.settings import option
from trimkv_cli.ui.plain import AnswerWriter, print_error, print_note, to_json

if TYPE_CHECKING:
    from trimkv_cli.commands.documents import Document, Reader
    from trimkv_cli.commands.summarize.pool import Chain, DocumentSummary, Outcome, Pool, Task
    from trimkv_cli.engine.engine import Engine
    from trimkv_cli.events import Answer
    from trimkv_cli.ui.panel import Jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryOptions:
    """How documents are read, and the form of their summaries."""

    combine: bool = option(False, "One summary of all files together.")
    save_cache: str | None = option(None, "Keep what was read, for trimkv ask --cache.", "KV")
    raw: bool = option(False, 'For models without a chat template: put "TL;DR:" under the text, to be continued.')
    encoding: str | None = ENCODING
    think: bool | None = THINK
    json: bool = JSON
    output: str | None = OUTPUT
    stream: bool = STREAM
    quiet: bool = QUIET
    stats: bool = STATS
    live: bool | None = LIVE
    ascii: bool = ASCII


def summarize(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE", help='Text, Markdown, source, HTML or PDF; globs; "-" for stdin.'),
    ],
    *,
    style: SummaryStyle,
    asked: SummaryOptions,
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

    names = expand(files)
    _check(names, asked, style, engine)
    reader = Reader(encoding=asked.encoding, quiet=asked.quiet)
    inputs = combined(names, reader) if asked.combine else Inputs.of(names, reader)
    _run(inputs, asked, style, engine, sampling)


def _check(names: Sequence[str], asked: SummaryOptions, style: SummaryStyle, engine: EngineOptions) -> None:
    if asked.raw and style != SummaryStyle():
        raise UsageError("--raw asks for nothing but a summary", hint="leave out --focus, --length and --format")
    if asked.raw and asked.save_cache is not None:
        raise UsageError("--save-cache keeps what messages go on with", hint="leave out --raw, or --save-cache")
    if asked.json and style.format == "json":
        raise UsageError("--json and --format json are both given", hint="--format json prints the points alone")
    if asked.save_cache is None:
        return
    if len(names) > 1 and not asked.combine:
        raise UsageError(
            "--save-cache keeps one reading", hint="run trimkv summarize once for each file, or --combine them"
        )
    if engine.on_overflow == "map-reduce":
        raise UsageError(
            "--save-cache keeps one reading, and --on-overflow map-reduce reads in parts", hint="--on-overflow rebase"
        )
    check_folder(asked.save_cache, "--save-cache")


def _run(
    inputs: Inputs, asked: SummaryOptions, style: SummaryStyle, engine: EngineOptions, sampling: SamplingOptions
) -> None:
    from trimkv_cli.commands.answers import open_engine
    from trimkv_cli.commands.memory import check_budget
    from trimkv_cli.commands.prompts import draw_seed, needs, open_answer
    from trimkv_cli.commands.summarize.pool import Task

    map_reduce = engine.on_overflow == "map-reduce"
    options = replace(engine, on_overflow="error") if map_reduce else engine
    if len(inputs.names) == 1 and not map_reduce:
        options = replace(options, max_inflight=1)
    instead = '--raw puts "TL;DR:" under the text'
    llm = open_engine(
        options,
        quiet=asked.quiet,
        check=needs(raw=asked.raw, thinks=sampling.think_budget is not None, instead=instead),
    )
    task = Task(
        instruction=TL_DR if asked.raw else style.instruction(),
        raw=asked.raw,
        params=draw_seed(sampling).resolve(llm.facts.sampling_defaults),
        max_tokens_said=sampling.max_tokens is not None,
        think=asked.think,
        map_reduce=map_reduce,
    )
    with open_answer(asked.output) as writer:
        failed = Summaries(llm, inputs, writer, asked, engine, as_points=style.format == "json").write(task)
    if failed and inputs.total == 1:
        raise failed[0]
    if failed:
        raise PartialFailure(
            f"{len(failed)} of {inputs.total} files failed", hint="each is named above; the others are summarized"
        )
    check_budget(llm)


class Summaries:
    """Write every summary in the order of the inputs, as soon as it and all before it are done."""

    def __init__(
        self,
        llm: Engine,
        inputs: Inputs,
        writer: AnswerWriter,
        asked: SummaryOptions,
        engine: EngineOptions,
        *,
        as_points: bool,
    ) -> None:
        from trimkv_cli.ui.live import Watch

        self._llm = llm
        self._inputs = inputs
        self._writer = writer
        self._asked = asked
        self._engine = engine
        self._as_points = as_points
        self._alone = len(inputs.names) == 1
        self._streams = self._alone and not (asked.json or not asked.stream or as_points)
        self._records: dict[int, dict[str, Any]] = {}
        self._done: dict[int, Outcome] = {}
        self._next = 0
        self._failed = list(inputs.faults)
        self._watch = Watch()

    def write(self, task: Task) -> list[TrimkvError]:
        """Summarize all inputs; return what failed."""
        from trimkv_cli.commands.memory import watch
        from trimkv_cli.commands.summarize.pool import Pool

        pool = Pool(self._llm, on_text=self._stream, on_answer=self._keep)
        asked, jobs = self._asked, None if self._alone else lambda: self._jobs(pool)
        with watch(self._llm, live=asked.live, quiet=asked.quiet, ascii_only=asked.ascii, jobs=jobs) as self._watch:
            for index, outcome in pool.run(self._chains(task), self._watch.tick):
                self._done[index] = outcome
                while self._next in self._done:
                    with self._watch.aside():
                        self._finish(self._next, self._done.pop(self._next))
                    self._next += 1
        return self._failed

    def _jobs(self, pool: Pool) -> Jobs:
        from trimkv_cli.ui.panel import Jobs

        failed = len(self._failed) + sum(isinstance(outcome, TrimkvError) for outcome in self._done.values())
        ended = self._next + len(self._done)
        left = len(self._inputs.names) - ended - pool.num_open
        return Jobs(done=ended - failed, failed=failed, running=pool.num_open, queued=max(0, left))

    def _chains(self, task: Task) -> Iterator[Chain]:
        return (self._chain(index, name, task) for index, name in enumerate(self._inputs.names))

    def _chain(self, index: int, name: str, task: Task) -> Chain:
        from trimkv_cli.commands.summarize.pool import summarize_text

        with self._watch.aside():  # a note about the file may be printed
            document = self._inputs.take(index)
        return (yield from summarize_text(self._llm, f"{index}:{name}", document.text, task))

    def _stream(self, _: int, piece: str) -> None:
        if self._streams:
            if sys.stdout.isatty():
                self._watch.end()  # the answer is its own progress
            self._writer.push(piece)

    def _keep(self, index: int, answer: Answer) -> None:
        """Take what only the row of a finished request can tell."""
        from trimkv_cli.commands.answers import save_read, to_completion

        if self._asked.json:
            self._records[index] = to_completion(self._llm, answer, self._engine)
        if self._asked.save_cache is not None:
            save_read(self._llm, answer.request.id, self._asked.save_cache)

    def _finish(self, index: int, outcome: Outcome) -> None:
        name = self._inputs.names[index]
        if isinstance(outcome, TrimkvError):
            self._failed.append(outcome)
            if self._inputs.total > 1:
                print_error(named(name, outcome), outcome.hint)
            return
        if not self._streams:
            self._print(index, name, outcome)
        self._writer.close()
        self._say(outcome)

    def _print(self, index: int, name: str, summed: DocumentSummary) -> None:
        if self._asked.json:
            self._writer.push(to_json(_record(self._records.pop(index), name, summed)))
        elif self._as_points:
            self._writer.push(as_json(name, summed.answer.text))
        else:
            title = "" if self._alone else f"## {name}\n\n"
            self._writer.push(f"{title}{summed.answer.text}")

    def _say(self, summed: DocumentSummary) -> None:
        from trimkv_cli.commands.answers import print_stats, say_if_cut, say_warnings

        say_warnings(summed.answer)
        if not self._asked.quiet:
            say_if_cut(summed.answer)
            if summed.parts > 1:
                print_note(f"summarized in {summed.parts} parts, {summed.rounds} rounds")
        if self._asked.stats:
            print_stats(self._llm, summed.answer, tokens=(summed.prompt_tokens, summed.completion_tokens))


def _record(record: dict[str, Any], name: str, summed: DocumentSummary) -> dict[str, Any]:
    """Add to a completion where it comes from; its usage counts all that was sent for it."""
    usage = {
        "prompt_tokens": summed.prompt_tokens,
        "completion_tokens": summed.completion_tokens,
        "total_tokens": summed.prompt_tokens + summed.completion_tokens,
    }
    ours = {**record["trimkv"], "input": name, "parts": summed.parts, "rounds": summed.rounds}
    return {**record, "usage": usage, "trimkv": ours}


@dataclass(slots=True, kw_only=True)
class Inputs:
    """What there is to summarize: documents, read when their turn comes, and faults met before."""

    names: list[str]
    total: int
    reader: Reader
    ready: dict[int, Document] = field(default_factory=dict)
    faults: list[TrimkvError] = field(default_factory=list)

    @classmethod
    def of(cls, names: list[str], reader: Reader) -> Inputs:
        """Take files one by one; a single one is read now, before a model is loaded for it."""
        inputs = cls(names=names, total=len(names), reader=reader)
        if len(names) == 1:
            inputs.ready[0] = _read(names[0], reader)
        return inputs

    def take(self, index: int) -> Document:
        """Return one document; raises as `Reader.document` does."""
        return self.ready.pop(index, None) or _read(self.names[index], self.reader)


def combined(names: Sequence[str], reader: Reader) -> Inputs:
    """Read all files and put them into one document; what cannot be read is said and counted.

    Raises:
        InputError: none could be read.
    """
    from trimkv_cli.commands.documents import Document

    documents, faults = [], []
    for name in names:
        try:
            documents.append(_read(name, reader))
        except TrimkvError as error:
            faults.append(error)
            if len(names) > 1:
                print_error(named(name, error), error.hint)
    if not documents:
        raise faults[0]
    text = joined([(document.name, document.text) for document in documents])
    whole = Document(name=", ".join(document.name for document in documents), text=text)
    return Inputs(names=[whole.name], total=len(names), reader=reader, ready={0: whole}, faults=faults)


def _read(name: str, reader: Reader) -> Document:
    document = reader.document(name)
    if not document.text.strip():
        raise InputError(f"{document.name} is empty", hint="there is nothing in it to summarize")
    return document


def named(name: str, error: TrimkvError) -> str:
    """Say whose error it is, unless its message does."""
    return error.message if name in error.message else f"{name}: {error.message}"
