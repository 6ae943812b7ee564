"""Start, speed and memory beside llama.cpp on larger GGUF files, with the same threads and prompts, in turns.

python -m bench.large_shapes FILE.gguf … --threads 2 --out kernels/bench/results/large-shapes.json

A start is a fresh process up to its first token on stdout, with the file in the page cache: `trimkv ask` and
`bench.llama_start`. Speed is measured in one process per side, in which llama.cpp loads anew for each pass; M = 256 and
streaming gates, prompts of random ids. Of resident memory `peak` is the kernel's own count, `anon` and `file` the
largest that were seen every 50 ms: a file that is mapped, as llama.cpp does, counts as `file` as far as it was read.
`idle` is what a process of the speeds held before it loaded, torch on both sides. Needs the extra `compare`; each row
is kept as it comes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from bench.against_llama import processor
from bench.record import write_record
from bench.watched import RESIDENT, Watched, resident_bytes
from trimkv_cli.bench.llama_cpp import LlamaCpp, LlamaSettings
from trimkv_cli.bench.shapes import load_network
from trimkv_cli.bench.speed import Case, SpeedOptions, about_network, measure
from trimkv_cli.files import whole_file
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import find_source

_KV_BUDGET = 256
_PROMPT = "The capital of France is"
_IDS = 49_152  # prompts are random ones below: every vocabulary here has them
_READ_AT_ONCE = 1 << 24

Side = Literal["trimkv", "llama.cpp"]
SIDES: tuple[Side, ...] = ("trimkv", "llama.cpp")


def start(side: Side, file: Path, threads: int) -> dict[str, Any]:
    """Start a fresh process and wait for one token."""
    started = time.perf_counter()
    if side == "llama.cpp":
        process = Watched.start("bench.llama_start", str(file), str(threads), _PROMPT)
        first = process.next_line()
        first_s = time.perf_counter() - started
        said = {name: first[name] for name in ("load_s", "prompt_tokens", "text")}
    else:
        options = ["--gates", "streaming", "--kv-budget", str(_KV_BUDGET), "--threads", str(threads)]
        answer = ["--raw", "--temperature", "0", "-n", "1", "--stream-json", "--quiet", _PROMPT]
        process = Watched.start("trimkv_cli", "ask", "-m", str(file), *options, *answer)
        first = process.next_line()
        first_s = time.perf_counter() - started
        last = process.next_line()
        said = {
            "load_s": last["trimkv"]["timing"]["load_s"],
            "prompt_tokens": last["usage"]["prompt_tokens"],
            "text": first["choices"][0]["delta"]["content"],
            "weight_bytes": last["trimkv"]["memory"]["weights_bytes"],
        }
    process.end()
    return {"first_token_s": first_s, **said, "resident": process.peaks}


def starts(file: Path, threads: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Start both sides in turns."""
    made: dict[Side, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:
            made[side].append(start(side, file, threads))
    for side, each in made.items():
        medians = {name: median(one[name] for one in each) for name in ("first_token_s", "load_s")}
        yield {"engine": side, "file": file.name, **each[0], **medians, "resident": _largest(each), "repeats": repeats}


def speeds(file: Path, contexts: Sequence[int], arguments: Sequence[str], repeats: int) -> Iterator[dict[str, Any]]:
    """Read and decode on both sides in turns."""
    sides = {side: _worker(side, file, arguments) for side in SIDES}
    about = {side: worker.next_line() for side, worker in sides.items()}
    for context in contexts:
        generator = torch.Generator().manual_seed(context)
        ids = torch.randint(_IDS, (context,), generator=generator).tolist()
        made: dict[Side, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(repeats):
            for side, worker in sides.items():
                made[side].append({**worker.ask({"ids": ids}), "resident": worker.peaks})
        for side, each in made.items():
            medians = {name: median(one[name] for one in each) for name in ("prefill_tps", "decode_tps")}
            known = {"engine": side, "file": file.name, "context": context, "repeats": repeats}
            yield {**known, **about[side], **each[0], **medians, "resident": _largest(each)}
    for worker in sides.values():
        worker.end()


def _worker(side: Side, file: Path, arguments: Sequence[str]) -> Watched:
    return Watched.start("bench.large_shapes", str(file), "--worker", side, *arguments, asked=True)


def _largest(each: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {name: max(one["resident"][name] for one in each) for name in RESIDENT}


def serve_trimkv(file: Path, threads: int) -> None:
    """Load, say what was chosen, and measure each prompt of stdin."""
    options = EngineOptions(model=str(file), gates="streaming", device="cpu", threads=threads, offline=True)
    idle = resident_bytes()
    network = load_network(find_source(options, weights=True), options)
    about = about_network(network, Case(context=1, rows=1, kv_budget=_KV_BUDGET))
    chosen = {name: about[name] for name in ("dtype", "quantize", "bits_per_weight")}
    print(json.dumps({"idle_bytes": idle, "kv_budget": _KV_BUDGET, **chosen}), flush=True)
    for line in sys.stdin:
        ids = json.loads(line)["ids"]
        case = Case(context=len(ids), rows=1, kv_budget=_KV_BUDGET)
        row = next(iter(measure(network, [case], SpeedOptions(text=ids))))
        names = ("prefill_tps", "decode_tps", "predicted_bytes")
        print(json.dumps({name: getattr(row, name) for name in names}), flush=True)


def serve_llama(file: Path, threads: int, settings: LlamaSettings) -> None:
    """Measure each prompt of stdin, each with a server of its own."""
    torch.set_num_threads(threads)
    llama = LlamaCpp(file=file, settings=settings)
    print(json.dumps({"idle_bytes": resident_bytes(), **asdict(settings)}), flush=True)
    for line in sys.stdin:
        prompts = torch.tensor([json.loads(line)["ids"]])
        timing = llama.run(prompts)
        speed = {"prefill_tps": prompts.numel() / timing.prefill_s, "decode_tps": 1 / median(timing.step_s)}
        print(json.dumps(speed), flush=True)


def _serve(side: Side, file: Path, threads: int, settings: LlamaSettings) -> None:
    if side == "trimkv":
        serve_trimkv(file, threads)
    else:
        serve_llama(file, threads, settings)


def _read_through(file: Path) -> None:
    """Let the file lie in the page cache."""
    with file.open("rb") as opened:
        while opened.read(_READ_AT_ONCE):
            pass


def main() -> None:
    """Measure, keeping what there is after every row in `--out`; without it print all in the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="FILE.gguf", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="start,512,4096", help="start, or a number of tokens; commas join")
    parser.add_argument("--flash-attention", choices=("auto", "on", "off"), default="auto", help="of llama.cpp")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    settings = LlamaSettings(flash_attention=given.flash_attention)
    if given.worker is not None:
        _serve(given.worker, given.files[0], given.threads, settings)
        return
    torch.set_num_threads(given.threads)
    told = given.only.split(",")
    contexts = [int(name) for name in told if name != "start"]
    own = {"engine", "version", "compiled_for"}
    peer = {name: value for name, value in LlamaCpp(file=given.files[0]).about().items() if name in own}
    record: dict[str, Any] = {**processor(), "peer": peer, "start": [], "speed": []}

    def keep(kind: str, rows: Iterator[dict[str, Any]]) -> None:
        for row in rows:
            record[kind].append(row)
            if given.out is not None:
                with whole_file(given.out) as partial:
                    write_record("bench.large_shapes", record, partial)

    for file in given.files:
        _read_through(file)
        if "start" in told:
            keep("start", starts(file, given.threads, given.repeats))
        if contexts:
            arguments = ("--threads", str(given.threads), "--flash-attention", given.flash_attention)
            keep("speed", speeds(file, contexts, arguments, given.repeats))
    if given.out is None:
        write_record("bench.large_shapes", record, None)


if __name__ == "__main__":
    main()
