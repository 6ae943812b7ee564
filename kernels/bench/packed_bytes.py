"""What packed weights take: a file's tensors, what is held of them, plan against allocation, and peaks of a process.

python -m bench.packed_bytes MODEL.gguf … --out kernels/bench/results/packed-bytes.json

Each file is run as it is stored, with M = 256, one row, chunks of 512 and streaming gates; `ask` then gets a budget of
exactly what its plan says. Of the first file the weights are also saved unpacked, in bf16, and loaded as int4.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.live_bytes import LiveBytes
from bench.memory import cache_bytes, requests
from bench.record import run_trimkv, write_record
from bench.watched import Watched, resident_bytes
from trimkv_cli.files import whole_file
from trimkv_cli.loading.gguf import gguf_tokenizer
from trimkv_cli.loading.loader import load_model, load_parts, load_source, plan_for
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import find_source
from trimkv_cli.model.gguf import read_gguf
from trimkv_cli.model.spec import DTYPE_BYTES
from trimkv_cli.plan.run import Run

_CPU = torch.device("cpu")
_KV_BUDGET, _CHUNK = 256, 512
_ROOMY = "64GiB"
_PROMPT_CHARACTERS = 6000
_README = Path(__file__).parents[2] / "README.md"
_CACHE = ("kv", "shared_prefix", "journal")
_WORKING = ("workspace", "logits", "dequantised", "unpacked")


def options_for(model: str, quantize: str) -> EngineOptions:
    """Fix every size, so that a budget chooses none."""
    return EngineOptions(
        model=model,
        gates="streaming",
        device="cpu",
        offline=True,
        quantize=quantize,
        kv_budget=str(_KV_BUDGET),
        prefill_chunk=_CHUNK,
        max_inflight=1,
        threads=1,
    )


def allocated(model: str, quantize: str) -> dict[str, Any]:
    """Count what is allocated for a prompt that is longer than cache and chunk, and what was planned, by part."""
    options = options_for(model, quantize)
    engine = load_source(find_source(options, weights=True), options)
    with LiveBytes() as live:
        list(engine.generate(requests(1, 2 * _CHUNK + _KV_BUDGET)))
    run, facts = engine.facts.plan.run, engine.facts
    planned = {
        "weights": run.part_bytes("weights"),
        "gates": run.part_bytes("gates"),
        "cache": sum(map(run.part_bytes, _CACHE)),
        "working": sum(map(run.part_bytes, _WORKING)),
    }
    measured = {
        "weights": facts.weight_bytes,
        "gates": facts.gate_bytes,
        "cache": cache_bytes(engine),
        "working": live.peak,
    }
    engine.close()
    return {
        **_about(run),
        "planned": planned,
        "allocated": measured,
        "planned_over_allocated": {name: planned[name] / taken for name, taken in measured.items() if taken},
        "total_planned_over_allocated": sum(planned.values()) / sum(measured.values()),
    }


def loaded(model: str, quantize: str) -> dict[str, Any]:
    """Load, and say what this process held before and what is held of the weights."""
    idle = resident_bytes()
    options = options_for(model, quantize)
    facts = load_parts(find_source(options, weights=True), options).facts
    run = facts.plan.run
    stored = DTYPE_BYTES[run.spec.dtype]
    layer = sum(rows * columns for rows, columns in run.spec.matrices) * stored
    vocabulary = run.spec.vocab_size * run.spec.hidden_size * stored
    sizes = {"idle": idle, "held": facts.weight_bytes, "one_layer": layer, "vocabulary": vocabulary}
    return {**_about(run), "load_s": facts.load_s, **{f"{name}_bytes": size for name, size in sizes.items()}}


def _about(run: Run) -> dict[str, Any]:
    return {
        "dtype": run.dtype,
        "quantize": run.quantize,
        "bits_per_weight": run.bits_per_weight,
        "account": run.packing.account,
        "parts": {part.name: part.bytes for part in run.parts},
    }


MEASURES: dict[str, Callable[[str, str], dict[str, Any]]] = {"allocated": allocated, "loaded": loaded}


def in_process(kind: str, model: str, quantize: str) -> dict[str, Any]:
    """Measure in a process of its own, and add what was resident there."""
    process = Watched.start("bench.packed_bytes", model, "--measure", kind, "--quantize", quantize)
    said = process.next_line()
    process.end()
    made = {"model": Path(model).name, **said, "resident": process.peaks}
    if kind == "loaded":
        # The vocabulary is the largest thing that is read at a time: in a small model larger than a layer.
        for largest in ("one_layer", "vocabulary"):
            known = made["idle_bytes"] + made["held_bytes"] + made[f"{largest}_bytes"]
            made[f"peak_over_runtime_held_and_{largest}"] = process.peaks["peak"] / known
    return made


def asked(model: str, quantize: str) -> dict[str, Any]:
    """Give `ask` exactly what its plan says, and compare with the peak of its process."""
    options = replace(options_for(model, quantize), budget=_ROOMY)
    budget = plan_for(find_source(options, weights=True), options, _CPU).run.total_bytes
    sizes = ["--kv-budget", str(_KV_BUDGET), "--prefill-chunk", str(_CHUNK), "--rows", "1", "--threads", "1"]
    which = ["-m", model, "--gates", "streaming", "--device", "cpu", "--quantize", quantize, "--budget", str(budget)]
    prompt = _README.read_text(encoding="utf-8")[:_PROMPT_CHARACTERS]
    said = run_trimkv(["ask", *which, *sizes, "--raw", "-n", "32", "--json", "--quiet", prompt])
    memory = said["trimkv"]["memory"]
    return {
        "model": Path(model).name,
        "budget_bytes": budget,
        "prompt_tokens": said["usage"]["prompt_tokens"],
        "peak_rss_bytes": memory["peak_bytes"],
        "peak_over_planned": memory["peak_bytes"] / budget,
        "undone_steps": memory["undone_steps"],
    }


def save_unpacked(model: str, folder: Path) -> None:
    """Save a GGUF file's weights in bf16, as a folder of safetensors."""
    source = find_source(options_for(model, "none"), weights=True)
    load_model(source, torch.bfloat16, _CPU).save_pretrained(folder)
    gguf_tokenizer(Path(model)).save_pretrained(folder)


def tensor_bytes(model: str) -> int:
    """Count the tensors of a GGUF file."""
    return sum(tensor.nbytes for tensor in read_gguf(Path(model)).tensors.values())


def main() -> None:
    """Measure, keeping what there is after every row in `--out`; without it print all in the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL.gguf", nargs="+")
    parser.add_argument("--measure", choices=("save", *MEASURES), help=argparse.SUPPRESS)
    parser.add_argument("--quantize", default="stored", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.measure == "save":
        save_unpacked(given.models[0], Path(given.models[1]))
        return
    if given.measure:
        print(json.dumps(MEASURES[given.measure](given.models[0], given.quantize)), flush=True)
        return
    record: dict[str, list[dict[str, Any]]] = {"held": [], "asked": [], "loaded": []}

    def keep(kind: str, row: dict[str, Any]) -> None:
        record[kind].append(row)
        if given.out is not None:
            with whole_file(given.out) as partial:
                write_record("bench.packed_bytes", record, partial)

    for model in given.models:
        row, stored = in_process("allocated", model, "stored"), tensor_bytes(model)
        keep("held", {"file_bytes": stored, "held_over_file": row["allocated"]["weights"] / stored, **row})
        keep("asked", asked(model, "stored"))
        keep("loaded", in_process("loaded", model, "stored"))
    with tempfile.TemporaryDirectory() as folder:
        Watched.start("bench.packed_bytes", given.models[0], folder, "--measure", "save").end()
        keep("loaded", {"saved_from": Path(given.models[0]).name, **in_process("loaded", folder, "int4")})
    if given.out is None:
        write_record("bench.packed_bytes", record, None)


if __name__ == "__main__":
    main()
