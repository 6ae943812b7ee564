"""`trimkv inspect`: what the cache kept of a prompt and its answer, per layer and KV head."""

from __future__ import annotations

import json as json_module
import sys
from dataclasses import replace
from typing import Annotated

import typer

from trimkv_cli.commands.options import Ascii, Color, Json, Quiet, Raw, System, SystemFile, Think, with_options
from trimkv_cli.engine.options import EngineOptions, SamplingOptions
from trimkv_cli.errors import InputError, UsageError


@with_options(engine=EngineOptions, sampling=SamplingOptions)
def inspect(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; text piped into stdin is appended.")] = None,
    *,
    prompt_token_ids: Annotated[
        str | None, typer.Option("--prompt-token-ids", help="A JSON list of token ids instead.", metavar="FILE.json")
    ] = None,
    system: System = None,
    system_file: SystemFile = None,
    think: Think = None,
    raw: Raw = False,
    json: Json = False,
    color: Color = "auto",
    ascii_only: Ascii = False,
    quiet: Quiet = False,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Show what each layer and KV head still holds when the answer is done, and for how much longer.

    trimkv inspect "My cat is called Zubo. What is my cat called?" --kv-budget 16

    trimkv inspect --kv-budget 256 --json < book.txt | jq .seen

    The last token of an answer is never fed, so prompt + N − 1 tokens are seen. --json prints
    {"seen", "kept": [layer][head][positions], "log_beta": [layer][head][seen], "output_token_ids"}.
    """
    from trimkv_cli.commands.answers import answer, open_engine
    from trimkv_cli.commands.memory import memory_use, pieces_of
    from trimkv_cli.commands.prompts import gather, read_system, render
    from trimkv_cli.engine.request import Request
    from trimkv_cli.ui.inspection import inspection
    from trimkv_cli.ui.look import Look

    if prompt_token_ids is not None and prompt is not None:
        raise UsageError("both a prompt and --prompt-token-ids are given", hint="give one of them")
    ids = _read_ids(prompt_token_ids) if prompt_token_ids is not None else None
    user = gather(prompt, []) if ids is None else ""
    llm = open_engine(replace(engine, max_inflight=1), quiet=quiet)
    if ids is None:
        ids = render(llm.text, user, system=read_system(system, system_file), raw=raw, think=think).token_ids
    params = sampling.resolve(llm.facts.sampling_defaults)
    request = Request(id="inspect", prompt_token_ids=ids, params=params, keep=True)
    llm.check(request)
    llm.start_trace()
    finished = answer(llm, request)
    if json:
        record = {
            "seen": llm.seen(request.id),
            "kept": llm.kept(request.id),
            "log_beta": llm.traced_log_beta(),
            "output_token_ids": list(finished.token_ids),
        }
        print(json_module.dumps(record))
    else:
        retained, look = llm.retained(request.id), Look.of(sys.stdout, colour=color, ascii_only=ascii_only)
        pieces = pieces_of(llm, [*ids, *finished.token_ids])[: retained.seen]
        print(inspection(retained, pieces, memory_use(llm, seen=retained.seen), look))


def _read_ids(path: str) -> tuple[int, ...]:
    from trimkv_cli.commands.prompts import read_text

    try:
        ids = json_module.loads(read_text(path))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}", hint="write a list of ids: [1, 2, 3]") from error
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f"{path} is not a plain list of token ids", hint="write a list of ids: [1, 2, 3]")
    return tuple(ids)
