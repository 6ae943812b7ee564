"""`trimkv ask`: one prompt, one answer; the verb for pipelines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from trimkv_cli.commands.answers import ChunkWriter
from trimkv_cli.commands.documents import Reader
from trimkv_cli.commands.options import (
    Encoding,
    Json,
    Live,
    Output,
    Quiet,
    Raw,
    SpecialTokens,
    Stats,
    Stream,
    System,
    SystemFile,
    Think,
    complete_template,
    with_options,
)
from trimkv_cli.errors import TrimkvError, UsageError
from trimkv_cli.events import Answer, Notice
from trimkv_cli.loading.options import EngineOptions, SamplingOptions
from trimkv_cli.ui.fences import code_blocks
from trimkv_cli.ui.plain import to_json

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine
    from trimkv_cli.request import Request
    from trimkv_cli.ui.plain import AnswerWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """In which form the flags want the answer."""

    json: bool
    stream_json: bool
    extract: bool
    stream: bool
    output: str | None
    live: bool | None
    warnings: tuple[Notice, ...] = ()  # about the prompt, for the record

    def __post_init__(self) -> None:
        chosen = {"--json": self.json, "--stream-json/--no-stream-json": self.stream_json, "--extract": self.extract}
        flags = [flag for flag, given in chosen.items() if given]
        if len(flags) > 1:
            raise UsageError(f"{' and '.join(flags)} are both given", hint="give one of them")


@with_options(engine=EngineOptions, sampling=SamplingOptions)
def ask(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; text piped into stdin is appended.")] = None,
    *,
    file: Annotated[
        list[str] | None,
        typer.Option("-f", "--file", help="Append a text, HTML or PDF file; may be given again.", metavar="FILE"),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            "-t",
            "--template",
            help="Put the prompt into a template of yours, at $input.",
            metavar="NAME",
            autocompletion=complete_template,
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option("-p", "--param", help="Fill another place of the template.", metavar="NAME=VALUE"),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache", help="Ask about what summarize --save-cache read, without reading again.", metavar="KV"
        ),
    ] = None,
    system: System = None,
    system_file: SystemFile = None,
    encoding: Encoding = None,
    think: Think = None,
    raw: Raw = False,
    special_tokens: SpecialTokens = False,
    json: Json = False,
    stream_json: Annotated[
        bool,
        typer.Option(
            "--stream-json/--no-stream-json", help="One JSON object a line as the answer comes (OpenAI's chunks)."
        ),
    ] = False,
    extract: Annotated[
        bool,
        typer.Option(
            "-x", "--extract/--no-extract", help="Print only the first code block; exit 1 when there is none."
        ),
    ] = False,
    output: Output = None,
    stream: Stream = True,
    quiet: Quiet = False,
    stats: Stats = False,
    live: Live = None,
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
    if cache is not None and (raw or system is not None or system_file is not None):
        raise UsageError("--cache goes on with a conversation that has begun", hint="leave out --raw and --system")
    form = _Form(json=json, stream_json=stream_json, extract=extract, stream=stream, output=output, live=live)

    from trimkv_cli.commands.prompts import check_raw, read_system

    reader = Reader(encoding=encoding, quiet=quiet)
    system_text = read_system(system, system_file, reader)
    check_raw(raw=raw, system=system_text, special_tokens=special_tokens)
    user = _prompt(prompt, file or [], template, param or [], reader)

    from trimkv_cli.commands.answers import next_turn, open_engine, print_stats, say_if_cut, within_room
    from trimkv_cli.commands.memory import check_budget
    from trimkv_cli.commands.prompts import draw_seed, names_tokens, needs, render
    from trimkv_cli.request import Request

    options = replace(engine, max_inflight=1)
    llm = open_engine(options, quiet=quiet, check=needs(raw=raw))
    params = draw_seed(sampling).resolve(llm.facts.sampling_defaults)
    if cache is not None:
        request = next_turn(llm, cache, user, params=params, think=think)
    else:
        form = replace(form, warnings=names_tokens(llm.text, user, raw=raw, special_tokens=special_tokens))
        rendered = render(llm.text, user, system=system_text, raw=raw, think=think, special_tokens=special_tokens)
        request = Request(
            id="ask",
            prompt_token_ids=rendered.token_ids,
            prefix_len=rendered.prefix_len,
            params=params,
            keep=True,
        )
    request = within_room(llm, request, said=sampling.max_tokens is not None, quiet=quiet)
    llm.check(request)
    finished = _answer(llm, request, form, options)
    if not quiet:
        say_if_cut(finished)
    if stats:
        print_stats(llm, finished)
    check_budget(llm)


def _prompt(prompt: str | None, files: list[str], template: str | None, parameters: list[str], reader: Reader) -> str:
    """Join prompt, files and stdin, and put them into the template where one is named."""
    from trimkv_cli.commands.prompts import fill, gather, read_template

    if template is None:
        if parameters:
            raise UsageError("-p fills a template, and none is named", hint="-t NAME")
        return gather(prompt, files, reader)
    read = read_template(template, reader)
    return fill(read, name=template, user=gather(prompt, files, reader, may_be_empty=True), parameters=parameters)


def _answer(llm: Engine, request: Request, form: _Form, options: EngineOptions) -> Answer:
    """Run the request and write its answer in the form that is wanted."""
    from trimkv_cli.commands.answers import answer, to_completion
    from trimkv_cli.commands.prompts import open_answer
    from trimkv_cli.ui.live import token_counter

    with open_answer(form.output) as writer, token_counter(wanted=form.live) as count:
        streaming = not (form.json or not form.stream or form.extract)
        chunks = ChunkWriter(writer.line, request_id=request.id, model=llm.facts.model_id) if form.stream_json else None
        show = writer.push if chunks is None else chunks.push

        def take(piece: str) -> None:
            count(piece)
            if streaming:
                show(piece)

        finished = answer(llm, request, take)
        if chunks is not None:
            chunks.end(to_completion(llm, finished, options, form.warnings))
        else:
            if not streaming:
                _write_whole(llm, finished, writer, form, options)
            writer.close()
    return finished


def _write_whole(llm: Engine, finished: Answer, writer: AnswerWriter, form: _Form, options: EngineOptions) -> None:
    from trimkv_cli.commands.answers import to_completion

    if form.json:
        writer.push(to_json(to_completion(llm, finished, options, form.warnings)))
    elif form.extract:
        writer.push(_code(finished.text))
    else:
        writer.push(finished.text)


def _code(text: str) -> str:
    blocks = code_blocks(text)
    if not blocks:
        raise TrimkvError("the answer has no code block", hint="ask for one, or leave out -x to see the answer")
    return blocks[0]
