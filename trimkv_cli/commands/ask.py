"""`trimkv ask`: one prompt, one answer; the verb for pipelines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import typer

from trimkv_cli.commands.options import (
    API_KEY,
    ENCODING,
    JSON,
    LIVE,
    OUTPUT,
    QUIET,
    RAW,
    SERVER,
    SPECIAL_TOKENS,
    STATS,
    STREAM,
    SYSTEM,
    SYSTEM_FILE,
    THINK,
)
from trimkv_cli.errors import TrimkvError, UsageError
from trimkv_cli.loading.options import EngineOptions, SamplingOptions
from trimkv_cli.settings import option
from trimkv_cli.ui.fences import code_blocks
from trimkv_cli.ui.plain import to_json

if TYPE_CHECKING:
    from trimkv_cli.commands.documents import Reader
    from trimkv_cli.commands.warm import Warm
    from trimkv_cli.events import Notice


class Finished(Protocol):
    """An answer that has ended, from an engine or a server."""

    @property
    def text(self) -> str: ...


Some = TypeVar("Some", bound=Finished)
_ID = "ask"


@dataclass(frozen=True, slots=True, kw_only=True)
class AskOptions:
    """Parts of the prompt, and the form of the answer."""

    file: list[str] | None = option(None, "Append a text, HTML or PDF file; may be given again.", "FILE", short="-f")
    template: str | None = option(None, "Put the prompt into a template of yours, at $input.", "NAME", short="-t")
    param: list[str] | None = option(None, "Fill another place of the template.", "NAME=VALUE", short="-p")
    cache: str | None = option(None, "Ask about what summarize --save-cache read, without reading again.", "KV")
    system: str | None = SYSTEM
    system_file: str | None = SYSTEM_FILE
    encoding: str | None = ENCODING
    think: bool | None = THINK
    raw: bool = RAW
    special_tokens: bool = SPECIAL_TOKENS
    json: bool = JSON
    stream_json: bool = option(False, "One JSON object a line as the answer comes (OpenAI's chunks).")
    extract: bool = option(False, "Print only the first code block; exit 1 when there is none.", short="-x")
    output: str | None = OUTPUT
    stream: bool = STREAM
    quiet: bool = QUIET
    stats: bool = STATS
    live: bool | None = LIVE
    server: str = SERVER
    api_key: str | None = API_KEY

    def __post_init__(self) -> None:
        if self.cache is not None and (self.raw or self.system is not None or self.system_file is not None):
            raise UsageError("--cache goes on with a conversation that has begun", hint="leave out --raw and --system")
        if self.cache is not None and self.server not in ("auto", "off"):
            raise UsageError("--cache is read where the model is loaded", hint="leave out --cache or --server")
        chosen = {"--json": self.json, "--stream-json/--no-stream-json": self.stream_json, "--extract": self.extract}
        flags = [flag for flag, given in chosen.items() if given]
        if len(flags) > 1:
            raise UsageError(f"{' and '.join(flags)} are both given", hint="give one of them")


def ask(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; text piped into stdin is appended.")] = None,
    *,
    form: AskOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Answer one prompt; stdout carries the answer and nothing else.

    trimkv ask "Why is the sky blue?"

    git diff | trimkv ask "Write a commit message for this change" | git commit -F -

    trimkv ask -f notes.txt -f report.pdf "What is decided, and by whom?" --json | jq -r .choices[0].message.content

    trimkv ask -x "A shell script that counts the lines of all Python files" > count.sh

    trimkv ask -t translate -p language=German < letter.txt

    trimkv ask --cache report.kv "Which risks does it name?"

    Templates are text files in the folder "templates" of the configuration folder, with $input where the prompt goes.
    """
    from trimkv_cli.commands.documents import Reader
    from trimkv_cli.commands.prompts import check_raw, read_system

    reader = Reader(encoding=form.encoding, quiet=form.quiet)
    system_text = read_system(form.system, form.system_file, reader)
    check_raw(raw=form.raw, system=system_text, special_tokens=form.special_tokens)
    user = _prompt(prompt, form, reader)
    warm = _ask_server(user, system_text, form, engine, sampling)
    if warm is None:
        _ask_here(user, system_text, form, engine, sampling)
    else:
        _hear(warm, form, engine)


def _ask_server(
    user: str, system: str | None, form: AskOptions, engine: EngineOptions, sampling: SamplingOptions
) -> Warm | None:
    """Put the prompt to a running server, where one is meant."""
    if form.server == "off" or form.cache is not None:
        return None
    from trimkv_cli.commands.prompts import draw_seed
    from trimkv_cli.commands.warm import Question, ask_server

    question = Question(user=user, system=system, raw=form.raw, think=form.think, special_tokens=form.special_tokens)
    return ask_server(question, form.server, form.api_key, engine=engine, sampling=draw_seed(sampling))


def _hear(warm: Warm, form: AskOptions, engine: EngineOptions) -> None:
    """Write the answer of a server as it comes."""
    from trimkv_cli.commands.warm import check_server_budget, say_after, say_before

    said = warm.said
    say_before(said.about, notes=engine.model is None and engine.profile is None, quiet=form.quiet)
    _answer(warm.answer, form, lambda heard: heard.to_completion("ask"), model=said.about.model)
    say_after(said, quiet=form.quiet, stats=form.stats)
    check_server_budget(said.extra)


def _ask_here(
    user: str, system: str | None, form: AskOptions, engine: EngineOptions, sampling: SamplingOptions
) -> None:
    """Load the model and answer."""
    from trimkv_cli.commands.answers import (
        answer,
        next_turn,
        open_engine,
        print_stats,
        say_warnings,
        to_completion,
        within_room,
    )
    from trimkv_cli.commands.memory import check_budget
    from trimkv_cli.commands.prompts import draw_seed, names_tokens, needs, render
    from trimkv_cli.request import Request
    from trimkv_cli.ui.cost import say_cut

    options = replace(engine, max_inflight=1)
    llm = open_engine(options, quiet=form.quiet, check=needs(raw=form.raw, thinks=sampling.think_budget is not None))
    params = draw_seed(sampling).resolve(llm.facts.sampling_defaults)
    warnings: tuple[Notice, ...] = ()
    if form.cache is not None:
        request = next_turn(llm, form.cache, user, params=params, think=form.think)
    else:
        warnings = names_tokens(llm.text, user, raw=form.raw, special_tokens=form.special_tokens)
        rendered = render(
            llm.text, user, system=system, raw=form.raw, think=form.think, special_tokens=form.special_tokens
        )
        request = Request(
            id=_ID,
            prompt_token_ids=rendered.token_ids,
            prefix_len=rendered.prefix_len,
            params=params,
            keep=True,
        )
    request = within_room(llm, request, said=sampling.max_tokens is not None, quiet=form.quiet)
    llm.check(request)
    finished = _answer(
        lambda take: answer(llm, request, take),
        form,
        lambda finished: to_completion(llm, finished, options, warnings),
        model=llm.facts.model_id,
    )
    say_warnings(finished)
    if not form.quiet:
        say_cut(finished.finish_reason, len(finished.token_ids))
    if form.stats:
        print_stats(llm, finished)
    check_budget(llm)


def _prompt(prompt: str | None, form: AskOptions, reader: Reader) -> str:
    """Join prompt, files and stdin, and put them into the template where one is named."""
    from trimkv_cli.commands.prompts import fill, gather, read_template

    files, places = form.file or [], form.param or []
    if form.template is None:
        if places:
            raise UsageError("-p fills a template, and none is named", hint="-t NAME")
        return gather(prompt, files, reader)
    read = read_template(form.template, reader)
    user = gather(prompt, files, reader, may_be_empty=True)
    return fill(read, name=form.template, user=user, parameters=places)


def _answer(
    run: Callable[[Callable[[str], None]], Some],
    form: AskOptions,
    record: Callable[[Some], dict[str, Any]],
    *,
    model: str,
) -> Some:
    """Let `run` answer, piece by piece, and write that in the form that is wanted."""
    from trimkv_cli.commands.prompts import open_answer

    with open_answer(form.output) as writer, _counter(wanted=form.live) as count:
        streaming = not (form.json or not form.stream or form.extract)
        chunks = None
        if form.stream_json:
            from trimkv_cli.commands.answers import ChunkWriter

            chunks = ChunkWriter(writer.line, request_id=_ID, model=model)
        show = writer.push if chunks is None else chunks.push

        def take(piece: str) -> None:
            count(piece)
            if streaming:
                show(piece)

        finished = run(take)
        if chunks is not None:
            chunks.end(record(finished))
        elif form.json:
            writer.push(to_json(record(finished)))
        elif form.extract:
            writer.push(_code(finished.text))
        elif not streaming:
            writer.push(finished.text)
        if chunks is None:
            writer.close()
    return finished


@contextmanager
def _counter(*, wanted: bool | None) -> Iterator[Callable[[str], None]]:
    """Count pieces on a terminal that shows nothing of the answer; elsewhere not even import what draws."""
    if wanted is False or not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda _: None
        return
    from trimkv_cli.ui.live import token_counter

    with token_counter(wanted=wanted) as count:
        yield count


def _code(text: str) -> str:
    blocks = code_blocks(text)
    if not blocks:
        raise TrimkvError("the answer has no code block", hint="ask for one, or leave out -x to see the answer")
    return blocks[0]
