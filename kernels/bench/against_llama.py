"""Decode and prefill beside llama.cpp at its best, with the same GGUF file, threads and prompts, in turns.

python -m bench.against_llama MODEL.gguf --threads 1 --out kernels/bench/results/against-llama-1-thread.json

A pilot tries flash attention and the types of llama.cpp's cache and takes what decodes fastest; 7,500 tokens and 8 rows
take what 2,048 did. Every context is then measured with M = 256 and with M ≥ length; each result is kept as it comes.
Needs the extra `compare`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from bench.record import write_record
from trimkv_cli.bench.llama_cpp import LlamaCpp, LlamaSettings
from trimkv_cli.bench.shapes import Network, load_network
from trimkv_cli.bench.speed import Case, SpeedOptions, about_network, make_prompts, measure
from trimkv_cli.engine.text import Text
from trimkv_cli.errors import ModelError
from trimkv_cli.files import whole_file
from trimkv_cli.loading.loader import load_text
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import find_source

_ROOT = Path(__file__).parents[2]
_ENGLISH = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")
_CPU_INFO = Path("/proc/cpuinfo")
_WIDE = ("avx", "amx", "fma", "f16c", "asimd", "sve", "i8mm")
_KV_BUDGET = 256
_CONTEXTS = {"512": (512, 1, 5), "2048": (2048, 1, 5), "7500": (7500, 1, 3), "2048x8": (2048, 8, 2)}  # repeats last
_PILOTED = ("512", "2048")
PILOT = (
    LlamaSettings(flash_attention="on"),
    LlamaSettings(flash_attention="off"),
    LlamaSettings(flash_attention="on", cache_k="q8_0", cache_v="q8_0"),
    LlamaSettings(flash_attention="off", cache_k="q8_0"),  # without flash attention values cannot be q8_0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """Both engines, and the text that their prompts are cut from."""

    network: Network
    llama: LlamaCpp
    text: Sequence[int]

    def pilot(self, context: int, rows: int) -> Iterator[dict[str, Any]]:
        """Try each of llama.cpp's settings once; those that it refuses have no speed."""
        prompts = make_prompts(self.network, Case(context=context, rows=rows, kv_budget=_KV_BUDGET), self.text)
        for settings in PILOT:
            about = {"context": context, "rows": rows, **asdict(settings)}
            try:
                timing = replace(self.llama, settings=settings).run(prompts)
            except ModelError as error:
                yield {**about, "decode_tps": None, "prefill_tps": None, "refused": error.message}
            else:
                speeds = {"decode_tps": rows / median(timing.step_s), "prefill_tps": rows * context / timing.prefill_s}
                yield {**about, **speeds}

    def rows(self, context: int, rows: int, repeats: int, settings: LlamaSettings) -> Iterator[dict[str, Any]]:
        """Measure M = 256 and llama.cpp in turns, then, for one row, M ≥ length."""
        bounded = Case(context=context, rows=rows, kv_budget=_KV_BUDGET)
        cases = [bounded]
        if rows == 1:
            cases.append(replace(bounded, kv_budget=context + bounded.answer_tokens))
        options = SpeedOptions(repeats=repeats, text=self.text)
        for row in measure(self.network, cases, options, replace(self.llama, settings=settings)):
            set_so = asdict(settings) if row.engine == "llama.cpp" else {}
            yield {**asdict(row), **set_so}


def best(tried: Sequence[dict[str, Any]]) -> LlamaSettings:
    """Return the settings that decoded fastest."""
    speeds = [row["decode_tps"] or 0.0 for row in tried]
    return PILOT[speeds.index(max(speeds))]


def read_text(text: Text, file: Path | None, tokens: int) -> list[int]:
    """Encode English, this repository's own unless a file is given, and repeat it up to so many tokens."""
    files = [file] if file is not None else [_ROOT / name for name in _ENGLISH]
    ids = text.encode("\n\n".join(path.read_text(encoding="utf-8") for path in files))
    return list(islice(cycle(ids), tokens))


def processor() -> dict[str, Any]:
    """Say which processor this is, what it can, and what else runs on it."""
    said = _CPU_INFO.read_text(encoding="utf-8") if _CPU_INFO.exists() else ""
    known = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in said.splitlines())}
    flags = known.get("flags") or known.get("Features") or ""
    return {
        "cpu": known.get("model name"),
        "cpu_flags": [flag for flag in flags.split() if flag.startswith(_WIDE)],
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
    }


def main() -> None:
    """Measure, keeping what there is after every row in `--out`; without it print all in the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quantize", default="auto", help="of trimkv's weights, as in trimkv run")
    parser.add_argument("--repeats", type=int, help="fewer than 5, 3 and 2", default=5)
    parser.add_argument("--only", default=",".join(_CONTEXTS), help="context or contextxrows; commas join")
    parser.add_argument("--text", type=Path, help="a file of English to cut prompts from")
    parser.add_argument("--quick", action="store_true", help="512 tokens, once, to try it")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    names = ["512"] if given.quick else given.only.split(",")
    if unknown := sorted(set(names) - set(_CONTEXTS)):
        parser.error(f"--only {','.join(unknown)}: there are {', '.join(_CONTEXTS)}")
    about = processor()
    options = EngineOptions(
        model=given.model, gates="streaming", device="cpu", threads=given.threads, quantize=given.quantize, offline=True
    )
    source = find_source(options, weights=True)
    llama = LlamaCpp.beside(source, options)
    text = load_text(source, trust_remote_code=False)
    assert text is not None, "a GGUF file has a tokenizer"
    network = load_network(source, options)
    chosen = [_CONTEXTS[name] for name in names]
    ids = read_text(text, given.text, max(context * rows for context, rows, _ in chosen))
    sides = Sides(network=network, llama=llama, text=ids)
    case = Case(context=512, rows=1, kv_budget=_KV_BUDGET)
    record = {**about, **about_network(network, case), "repeats": given.repeats}
    varied = asdict(llama.settings).keys()
    peer = {name: value for name, value in llama.about().items() if name not in varied}
    record |= {"file": Path(given.model).name, "peer": peer, "pilot": [], "rows": []}

    def keep(kind: str, row: dict[str, Any]) -> None:
        record[kind].append(row)
        if given.out is not None:
            with whole_file(given.out) as partial:
                write_record("bench.against_llama", record, partial)

    settings: LlamaSettings | None = None
    for name in names:
        context, rows, repeats = _CONTEXTS[name]
        if settings is None or name in _PILOTED:
            tried = []
            for row in sides.pilot(context, rows):
                keep("pilot", row)
                tried.append(row)
            settings = best(tried)
        repeats = 1 if given.quick else min(repeats, given.repeats)
        for row in sides.rows(context, rows, repeats, settings):
            keep("rows", {**row, "repeats": repeats})
    if given.out is None:
        write_record("bench.against_llama", record, None)


if __name__ == "__main__":
    main()
