"""`trimkv eval`: what a budget costs, beside a full cache, streaming and random eviction."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from trimkv_cli.commands.options import Json, ModelName, Quiet, with_options
from trimkv_cli.errors import UsageError
from trimkv_cli.eval.scoring import POLICIES, Match, Policy
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.ui.plain import print_answer, print_note
from trimkv_cli.units import parse_kv_budget, read_flag

if TYPE_CHECKING:
    from trimkv_cli.eval.exam import EvalOptions
    from trimkv_cli.eval.scoring import EvalResult
    from trimkv_cli.loading.sources import Source

_BUDGETS = "32,64,128"


@with_options(engine=EngineOptions)
def evaluate(
    name: ModelName = None,
    *,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="LIST",
            help="Of recall, kv-retrieval, multi-turn, procedure; default: all, or none with --data.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE.jsonl",
            help='Your own questions: lines {"messages": [...], "answer": "..."}, or "prompt" for a text to continue.',
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", metavar="LIST", help=f"Slots per KV head, as --kv-budget; default {_BUDGETS}."),
    ] = None,
    policies: Annotated[
        str, typer.Option("--policies", metavar="LIST", help="What to compare, in this order.")
    ] = ",".join(POLICIES),
    samples: Annotated[
        int | None,
        typer.Option("--samples", metavar="N", help="Questions per task; default 100, and all lines of --data."),
    ] = None,
    match: Annotated[
        Match,
        typer.Option("--match", help="exact: in mini's own wording; contains: in any wording."),
    ] = "exact",
    max_tokens: Annotated[
        int | None,
        typer.Option("-n", "--max-tokens", metavar="N", help="Most tokens of an answer; default: as the expected one."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Same seed, same questions.")] = 0,
    plot: Annotated[
        str | None,
        typer.Option("--plot", metavar="FILE.png|svg", help="Draw accuracy against budget (needs trimkv-cli[plot])."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    engine: EngineOptions,
) -> None:
    """Measure accuracy at several budgets, beside a full cache, streaming and random eviction of the same size.

    trimkv eval mini --tasks recall --context 1000 --budgets 32,64,128 --samples 100 --seed 7

    trimkv eval qwen3-4b-instruct-2507 --data questions.jsonl --match contains --kv-budget 512,1024 --json

    Answers are greedy; log p is the mean log probability of a token of the expected answers. Every question is a
    prompt of its own: in multi-turn and procedure the earlier questions stand in it with their right answers. --context
    is the length of the conversations that are made. --prefill-chunk is 32 here unless it is given: a chunk longer than
    M sees more than M.
    """
    from trimkv_cli.loading.sources import find_source

    if plot is not None:
        _check_plot(plot)
    if budgets is not None and engine.kv_budget is not None:
        raise UsageError("--budgets and --kv-budget are both given", hint="they are the same: give one")
    asked = _eval_options(
        tasks=tasks,
        data=data,
        budgets=budgets or engine.kv_budget or _BUDGETS,
        policies=policies,
        samples=samples,
        match=match,
        max_tokens=max_tokens,
        seed=seed,
        engine=engine,
    )
    gates = engine.gates if "gates" in asked.policies else "none"
    options = replace(engine, model=name or engine.model, gates=gates)
    rows = _evaluate(find_source(options, weights=True), options, asked, quiet=quiet)
    if plot is not None:
        from trimkv_cli.eval.plot import draw

        draw(rows, plot)
    _show(rows, json=json)


def _eval_options(
    *,
    tasks: str | None,
    data: str | None,
    budgets: str,
    policies: str,
    samples: int | None,
    match: Match,
    max_tokens: int | None,
    seed: int,
    engine: EngineOptions,
) -> EvalOptions:
    from trimkv_cli.eval.exam import TASKS, EvalOptions

    for budget in _split(budgets):
        read_flag("--budgets", budget, parse_kv_budget)
    named = tuple(TASKS) if tasks is None and data is None else _split(tasks or "")
    return EvalOptions(
        tasks=named,
        data=data,
        context=1000 if engine.context is None else engine.context,
        samples=samples,
        seed=seed,
        budgets=_split(budgets),
        policies=tuple(_policy(word) for word in _split(policies)),
        prefill_chunk=32 if engine.prefill_chunk is None else engine.prefill_chunk,
        match=match,
        max_tokens=max_tokens,
    )


def _evaluate(source: Source, options: EngineOptions, asked: EvalOptions, *, quiet: bool) -> list[EvalResult]:
    from trimkv_cli.eval.run import evaluate

    return evaluate(source, options, asked, say=(lambda _: None) if quiet else print_note)


def _show(rows: list[EvalResult], *, json: bool) -> None:
    if json:
        print(json_module.dumps({"rows": [asdict(row) for row in rows]}))
        return
    from trimkv_cli.ui.accuracy import accuracy_report

    print_answer(accuracy_report(rows))


def _check_plot(path: str) -> None:
    """Refuse what could not be drawn before hours are spent on it."""
    from importlib.util import find_spec
    from pathlib import Path

    if Path(path).suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {path} is neither PNG nor SVG", hint="--plot accuracy.svg")
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"cannot write {path}: its folder does not exist", hint="check the path given to --plot")
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib", hint="pip install 'trimkv-cli[plot]'")


def _split(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _policy(word: str) -> Policy:
    for policy in POLICIES:
        if word == policy:
            return policy
    raise UsageError(f"there is no policy {word!r}", hint=f"--policies {','.join(POLICIES)}")
