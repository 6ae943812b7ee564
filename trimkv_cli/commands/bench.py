"""`trimkv bench`: speed and peak memory, beside another engine where asked."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trimkv_cli.commands.options import JSON, QUIET
from trimkv_cli.errors import ContextOverflow, UsageError
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.settings import option
from trimkv_cli.ui.plain import print_note, print_warning
from trimkv_cli.units import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from trimkv_cli.bench.shapes import Network
    from trimkv_cli.bench.speed import Case, Peer, SpeedRow
    from trimkv_cli.loading.sources import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is measured, as typed."""

    shape: str | None = option(None, "A network of this size: 10m, or a profile such as qwen3-4b-math.", "NAME")
    random_weights: bool = option(False, "Fill the --shape with random numbers instead of downloading it.")
    contexts: str = option("1024", "Prompt tokens before decoding is measured.", "LIST")
    rows: str = option("1", "Sequences at a time.", "LIST")
    kv_budget: str | None = option(None, "Slots per KV head; default: as trained, or 256.", "LIST", setting=True)
    compare: Literal["hf", "llama.cpp"] | None = option(
        None, "In turns with it: hf, transformers' own generate, or llama.cpp with the same GGUF file; full caches."
    )
    repeats: int = option(1, "Measure everything N times in turn; medians over all.", "N", least=1)
    evict: bool = option(True, "Leave scoring and eviction out, to see what they cost.")


def bench(
    name: Annotated[
        str | None, typer.Argument(help="Profile name, hub id, folder or GGUF file.", metavar="[MODEL]")
    ] = None,
    *,
    chosen: BenchOptions,
    engine: Annotated[EngineOptions, "model", "gates", "offline", "dtype", "quantize", "device", "threads"],
    json: bool = JSON,
    quiet: bool = QUIET,
) -> None:
    """Measure prefill, decode and peak memory over budgets, contexts and rows; predicted bytes come first.

    trimkv bench --shape 10m --random-weights --kv-budget 256 --contexts 1024,8192,32768 --compare hf

    trimkv bench MODEL.gguf --kv-budget 256 --contexts 512,2048 --compare llama.cpp --threads 1

    Decode is the median over 64 tokens after the context. trimkv and hf read the prompt in chunks of 512.
    """
    from trimkv_cli.bench.speed import about_network

    options = replace(engine, model=name or engine.model)
    budgets = None if chosen.kv_budget is None else _numbers(chosen.kv_budget, "--kv-budget")
    lengths, counts = _numbers(chosen.contexts, "--contexts"), _numbers(chosen.rows, "--rows")
    source = _source(options, chosen)
    llama = _llama(source, options) if chosen.compare == "llama.cpp" else None
    network = _network(source, options, chosen)
    peer = _transformers(network) if chosen.compare == "hf" else llama
    cases = _cases(network, budgets or [network.gate.memory_size or 256], lengths, counts)
    for message in network.warnings:
        print_warning(message)
    if not quiet:
        _announce(network, cases)
    about = {**about_network(network, cases[0]), "peer": None if peer is None else peer.about()}
    _show(_measure(network, cases, chosen, peer), about, json=json)


def _source(options: EngineOptions, chosen: BenchOptions) -> Source | None:
    """Find the model whose weights are measured; None for a shape of random ones."""
    from trimkv_cli.loading.sources import find_source

    if chosen.shape is None:
        if chosen.random_weights:
            raise UsageError("--random-weights needs a --shape", hint="--shape 10m --random-weights")
        return find_source(options, weights=True)
    if not chosen.random_weights:
        raise UsageError(f"--shape {chosen.shape} has no weights of its own", hint="add --random-weights")
    if options.model is not None:
        raise UsageError("a model and a --shape are both given", hint="leave one of them out")
    return None


def _network(source: Source | None, options: EngineOptions, chosen: BenchOptions) -> Network:
    from trimkv_cli.bench.shapes import find_shape, load_network, random_network

    if source is not None:
        return load_network(source, options)
    assert chosen.shape is not None, "there is a source or a shape"
    return random_network(find_shape(chosen.shape), options)


def _llama(source: Source | None, options: EngineOptions) -> Peer:
    from trimkv_cli.bench.llama_cpp import LlamaCpp

    return LlamaCpp.beside(source, options)


def _transformers(network: Network) -> Peer:
    from trimkv_cli.bench.hf import Transformers

    return Transformers(network=network)


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
            + (": nothing is evicted" if case.keeps_all else "")
        )


def _measure(network: Network, cases: Sequence[Case], chosen: BenchOptions, peer: Peer | None) -> Iterator[SpeedRow]:
    from trimkv_cli.bench.speed import SpeedOptions, measure

    warm_up = network.model.device.type == "cuda"  # on a CPU nothing is compiled, and a prompt takes seconds
    return measure(network, cases, SpeedOptions(eviction=chosen.evict, repeats=chosen.repeats, warm_up=warm_up), peer)


def _show(rows: Iterator[SpeedRow], about: Mapping[str, Any], *, json: bool) -> None:
    from trimkv_cli.bench.speed import surroundings
    from trimkv_cli.ui.accuracy import speed_lines

    measured = list(rows)
    if json:
        print(json_module.dumps({"rows": [asdict(row) for row in measured], **about, **surroundings("trimkv_cli")}))
        return
    for line in speed_lines(measured):
        print(line)


def _numbers(text: str, flag: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"{flag} {text!r} is not a list of whole numbers above 0", hint=f"{flag} 1024,8192")
    return list(dict.fromkeys(int(word) for word in words))
