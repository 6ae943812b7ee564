"""`trimkv bench`: speed and peak memory, beside transformers' own generate where asked."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from trimkv_cli.commands.options import Gates, Json, Model, Offline, Quiet, option
from trimkv_cli.errors import ContextOverflow, UsageError
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.ui.plain import print_note, print_warning
from trimkv_cli.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trimkv_cli.bench.shapes import Network
    from trimkv_cli.bench.speed import Case, SpeedRow


def bench(
    name: Annotated[str | None, typer.Argument(help="Profile name, hub id or folder.", metavar="[MODEL]")] = None,
    *,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape", metavar="NAME", help="A network of this size: 10m, or a profile such as qwen3-4b-math."
        ),
    ] = None,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights/--no-random-weights",
            help="Fill the --shape with random numbers instead of downloading it.",
        ),
    ] = False,
    contexts: Annotated[
        str, typer.Option("--contexts", metavar="LIST", help="Prompt tokens before decoding is measured.")
    ] = "1024",
    rows: Annotated[str, typer.Option("--rows", metavar="LIST", help="Sequences at a time.")] = "1",
    kv_budget: Annotated[
        str | None, typer.Option("--kv-budget", metavar="LIST", help="Slots per KV head; default: as trained, or 256.")
    ] = None,
    compare: Annotated[
        Literal["hf"] | None,
        typer.Option("--compare", help="hf: transformers' own generate with its full cache, in the same run."),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, metavar="N", help="Measure everything N times in turn; medians over all.")
    ] = 1,
    evict: Annotated[
        bool, typer.Option("--evict/--no-evict", help="Leave scoring and eviction out, to see what they cost.")
    ] = True,
    model: Model = None,
    gates: Gates = "auto",
    offline: Offline = False,
    dtype: Annotated[str, option("dtype")] = "auto",
    device: Annotated[str, option("device")] = "auto",
    threads: Annotated[int | None, option("threads")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure prefill, decode and peak memory over budgets, contexts and rows; predicted bytes come first.

    trimkv bench --shape 10m --random-weights --kv-budget 256 --contexts 1024,8192,32768 --compare hf

    Decode is the median over 64 tokens after the context. Both sides read the prompt in chunks of 512.
    """
    options = EngineOptions(
        model=name or model, gates=gates, offline=offline, dtype=dtype, device=device, threads=threads
    )
    budgets = None if kv_budget is None else _numbers(kv_budget, "--kv-budget")
    lengths, counts = _numbers(contexts, "--contexts"), _numbers(rows, "--rows")
    network = _network(options, shape, random_weights=random_weights)
    cases = _cases(network, budgets or [network.gate.memory_size or 256], lengths, counts)
    for message in network.warnings:
        print_warning(message)
    if not quiet:
        _announce(network, cases)
    measured = _measure(network, cases, compare=compare is not None, evict=evict, repeats=repeats)
    _show(measured, network, json=json)


def _network(options: EngineOptions, shape: str | None, *, random_weights: bool) -> Network:
    from trimkv_cli.bench.shapes import find_shape, load_network, random_network

    if shape is None:
        if random_weights:
            raise UsageError("--random-weights needs a --shape", hint="--shape 10m --random-weights")
        return load_network(options)
    if not random_weights:
        raise UsageError(f"--shape {shape} has no weights of its own", hint="add --random-weights")
    if options.model is not None:
        raise UsageError("a model and a --shape are both given", hint="leave one of them out")
    return random_network(find_shape(shape), options)


def _cases(network: Network, budgets: list[int], contexts: list[int], rows: list[int]) -> list[Case]:
    from trimkv_cli.bench.speed import MEASURED_TOKENS, Case

    longest = max(contexts) + MEASURED_TOKENS
    if longest > network.spec.max_positions:
        raise ContextOverflow(
            f"a context of {max(contexts)} and what is generated need {longest} positions, and {network.name} has "
            f"{network.spec.max_positions}",
            hint=f"--contexts {network.spec.max_positions - MEASURED_TOKENS}",
        )
    return [Case(context=c, rows=r, kv_budget=b) for r in rows for c in contexts for b in budgets]


def _announce(network: Network, cases: Sequence[Case]) -> None:
    from trimkv_cli.bench.speed import predict

    for case in cases:
        run = predict(network, case)
        parts = ", ".join(
            f"{part.name.replace('_', ' ')} {format_size(part.bytes)}" for part in run.parts if part.bytes
        )
        print_note(
            f"predicted for M = {case.kv_budget}, {case.rows} rows, context {case.context:,}: "
            f"{format_size(run.total_bytes)} ({parts}); a full cache alone would be "
            f"{format_size(case.rows * run.full_cache_bytes(case.context))}"
        )


def _measure(
    network: Network, cases: Sequence[Case], *, compare: bool, evict: bool, repeats: int
) -> Iterator[SpeedRow]:
    from trimkv_cli.bench.speed import SpeedOptions, measure

    chosen = SpeedOptions(compare=compare, eviction=evict, repeats=repeats)
    return measure(network, cases, chosen)


def _show(rows: Iterator[SpeedRow], network: Network, *, json: bool) -> None:
    from trimkv_cli.bench.speed import surroundings
    from trimkv_cli.ui.accuracy import speed_lines

    measured = list(rows)
    if json:
        about = {"shape": network.name, "dtype": network.dtype, "device": network.device_name}
        print(json_module.dumps({"rows": [asdict(row) for row in measured], **about, **surroundings("trimkv_cli")}))
        return
    for line in speed_lines(measured):
        print(line)


def _numbers(text: str, flag: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"{flag} {text!r} is not a list of whole numbers above 0", hint=f"{flag} 1024,8192")
    return list(dict.fromkeys(int(word) for word in words))
