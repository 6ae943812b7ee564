"""`trimkv summarize`: documents of any length read through the bounded cache."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimkv_cli.commands.options import (
    API_KEY,
    ASCII,
    ENCODING,
    JSON,
    LIVE,
    OUTPUT,
    QUIET,
    SERVER,
    STATS,
    STREAM,
    THINK,
)
from trimkv_cli.commands.summarize.texts import TL_DR, SummaryStyle
from trimkv_cli.errors import PartialFailure, TrimkvError, UsageError
from trimkv_cli.files import check_folder
from trimkv_cli.loading.options import EngineOptions, SamplingOptions
from trimkv_cli.settings import option
from trimkv_cli.ui.plain import print_note

if TYPE_CHECKING:
    from trimkv_cli.commands.summarize.inputs import Inputs
    from trimkv_cli.commands.summarize.pool import Chain, DocumentSummary, Pool, Task
    from trimkv_cli.commands.summarize.sheet import Sheet, Summed
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
    server: str = SERVER
    api_key: str | None = API_KEY


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

    Where a `trimkv serve` runs that was started with the same model, gates and settings, it is sent one request a
    document; --save-cache, --live and map-reduce read here.
    """
    from trimkv_cli.commands.documents import Reader, expand
    from trimkv_cli.commands.summarize.inputs import Inputs, combined

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
    for flag, given in (("--save-cache", asked.save_cache is not None), ("--live", asked.live)):
        if given and asked.server not in ("auto", "off"):
            raise UsageError(f"{flag}: a server does not hand out its cache", hint="--server off")
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
    from trimkv_cli.commands.prompts import draw_seed, open_answer
    from trimkv_cli.commands.summarize.sheet import Sheet

    sampling = draw_seed(sampling)
    with open_answer(asked.output) as writer:
        sheet = Sheet(inputs, writer, asked, as_points=style.format == "json")
        check = _ask_servers(inputs, sheet, asked, style, engine, sampling)
        if check is None:
            check = _summarize_here(inputs, sheet, asked, style, engine, sampling)
    if sheet.faults and inputs.total == 1:
        raise sheet.faults[0]
    if sheet.faults:
        raise PartialFailure(
            f"{len(sheet.faults)} of {inputs.total} files failed", hint="each is named above; the others are summarized"
        )
    check()


def _ask_servers(
    inputs: Inputs,
    sheet: Sheet,
    asked: SummaryOptions,
    style: SummaryStyle,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> Callable[[], None] | None:
    """Have a running server write the summaries, where one is meant; return what checks its budget."""
    if asked.server == "off" or asked.save_cache is not None or (asked.live and asked.server == "auto"):
        return None
    from trimkv_cli.commands.summarize.remote import Asking, write
    from trimkv_cli.commands.warm import check_server_budget, find_servers, say_before
    from trimkv_cli.serve.client import NoAnswer

    found = find_servers(
        asked.server, asked.api_key, think=asked.think, chats=not asked.raw, engine=engine, sampling=sampling
    )
    for server in found:
        asking = Asking(
            server=server,
            instruction=TL_DR if asked.raw else style.instruction(),
            raw=asked.raw,
            think=asked.think,
            sampling=sampling,
            quiet=asked.quiet,
            stats=asked.stats,
        )
        say_before(server.about, notes=engine.model is None and engine.profile is None, quiet=asked.quiet)
        try:
            extra = write(asking, inputs, sheet)
        except NoAnswer:
            if asked.server != "auto":
                raise
            continue
        return lambda: check_server_budget(extra)
    return None


def _summarize_here(
    inputs: Inputs,
    sheet: Sheet,
    asked: SummaryOptions,
    style: SummaryStyle,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> Callable[[], None]:
    """Load the model and write the summaries; return what checks the budget."""
    from trimkv_cli.commands.answers import open_engine
    from trimkv_cli.commands.memory import check_budget
    from trimkv_cli.commands.prompts import needs
    from trimkv_cli.commands.summarize.pool import Task

    map_reduce = engine.on_overflow == "map-reduce"
    options = replace(engine, on_overflow="error") if map_reduce else engine
    if sheet.alone and not map_reduce:
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
        params=sampling.resolve(llm.facts.sampling_defaults),
        max_tokens_said=sampling.max_tokens is not None,
        think=asked.think,
        map_reduce=map_reduce,
    )
    Summaries(llm, inputs, sheet, asked, engine).write(task)
    return lambda: check_budget(llm)


class Summaries:
    """Summarize over the rows of one engine."""

    def __init__(self, llm: Engine, inputs: Inputs, sheet: Sheet, asked: SummaryOptions, engine: EngineOptions) -> None:
        from trimkv_cli.ui.live import Watch

        self._llm = llm
        self._inputs = inputs
        self._sheet = sheet
        self._asked = asked
        self._engine = engine
        self._records: dict[int, dict[str, Any]] = {}
        self._watch = Watch()

    def write(self, task: Task) -> None:
        """Summarize all inputs."""
        from trimkv_cli.commands.memory import watch
        from trimkv_cli.commands.summarize.pool import Pool

        pool = Pool(self._llm, on_text=self._stream, on_answer=self._keep)
        asked, jobs = self._asked, None if self._sheet.alone else lambda: self._jobs(pool)
        with watch(self._llm, live=asked.live, quiet=asked.quiet, ascii_only=asked.ascii, jobs=jobs) as self._watch:
            for index, outcome in pool.run(self._chains(task), self._watch.tick):
                with self._watch.aside():
                    self._sheet.put(
                        index, outcome if isinstance(outcome, TrimkvError) else self._summed(index, outcome)
                    )

    def _jobs(self, pool: Pool) -> Jobs:
        from trimkv_cli.ui.panel import Jobs

        failed, ended = self._sheet.failed, self._sheet.ended
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
        if self._sheet.streams:
            if sys.stdout.isatty():
                self._watch.end()  # the answer is its own progress
            self._sheet.writer.push(piece)

    def _keep(self, index: int, answer: Answer) -> None:
        """Take what only the row of a finished request can tell."""
        from trimkv_cli.commands.answers import save_read, to_completion

        if self._asked.json:
            self._records[index] = to_completion(self._llm, answer, self._engine)
        if self._asked.save_cache is not None:
            save_read(self._llm, answer.request.id, self._asked.save_cache)

    def _summed(self, index: int, summary: DocumentSummary) -> Summed:
        from trimkv_cli.commands.summarize.sheet import Summed

        return Summed(
            text=summary.answer.text,
            record=lambda: self._records.pop(index),
            say=lambda: self._say(summary),
            tokens=(summary.prompt_tokens, summary.completion_tokens),
            parts=summary.parts,
            rounds=summary.rounds,
        )

    def _say(self, summed: DocumentSummary) -> None:
        from trimkv_cli.commands.answers import print_stats, say_warnings
        from trimkv_cli.ui.cost import say_cut

        say_warnings(summed.answer)
        if not self._asked.quiet:
            say_cut(summed.answer.finish_reason, len(summed.answer.token_ids))
            if summed.parts > 1:
                print_note(f"summarized in {summed.parts} parts, {summed.rounds} rounds")
        if self._asked.stats:
            print_stats(self._llm, summed.answer, tokens=(summed.prompt_tokens, summed.completion_tokens))
