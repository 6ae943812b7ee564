"""Record how many marked points of long notes files `trimkv summarize` lists, and what it takes.

python -m bench.points --out kernels/bench/results/points-mini.json
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from transformers import AutoTokenizer

from bench.record import run_trimkv, write_record
from examples.mini import texts
from trimkv_cli.eval.scoring import normalise
from trimkv_cli.mini import MODEL_FOLDER

FLAGS = "--kv-budget {kv_budget} --prefill-chunk 32 --greedy --json -q"
_BULLET = re.compile(r"^\s*[-*•]?\s*(\d+[:.)])?\s*")


def count_points(output: str, points: Sequence[str]) -> tuple[int, int]:
    """Count how many of `points` an output lists, and how many of its lines are none of them: (listed, invented).

    A line counts without its bullet and number. A point that is listed twice is listed once; nothing is invented by it.
    """
    said = [normalise(_BULLET.sub("", line)) for line in output.splitlines() if line.strip()]
    wanted = {normalise(point) for point in points}
    return len(wanted & set(said)), sum(line not in wanted for line in said)


def measure(model: str, *, files: int, tokens: int, points: int, kv_budget: int) -> dict[str, Any]:
    """Summarize `files` generated notes files of about `tokens` tokens, seeds and phrasings as no training had them."""
    length = _words(tokens)
    asked = [
        texts.make_notes(Random(f"bench points {tokens} {i}"), points=points, length=length, unseen=True)
        for i in range(files)
    ]
    said = [_summarize(model, notes.text, FLAGS.format(kv_budget=kv_budget)) for notes in asked]
    counts = [count_points(_text(one), notes.points) for one, notes in zip(said, asked, strict=True)]
    return {
        "tokens": round(sum(one["usage"]["prompt_tokens"] for one in said) / files),
        "kv_budget": kv_budget,
        "files": files,
        "points": files * points,
        "listed": sum(listed for listed, _ in counts),
        "invented": sum(invented for _, invented in counts),
        "kv_bytes": said[0]["trimkv"]["memory"]["kv_bytes"],
        "peak_bytes": max(one["trimkv"]["memory"]["peak_bytes"] for one in said),
    }


def _words(tokens: int) -> int:
    """Return the length of notes that are about `tokens` tokens of mini's tokenizer; a conversation has more a word."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    sample = texts.make_notes(Random("bench points"), points=1, length=1000)
    return round(tokens * 1000 / len(tokenizer.encode(sample.text)))


def _text(record: dict[str, Any]) -> str:
    return str(record["choices"][0]["message"]["content"])


def _summarize(model: str, text: str, flags: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "notes.txt"
        path.write_text(text, encoding="utf-8")
        return run_trimkv(["summarize", str(path), "-m", model, *flags.split()])


def main() -> None:
    """Measure at three lengths: what is listed should stay, and so should memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--files", type=int, default=12)
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--kv-budget", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2_000, 5_000, 20_000])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [
        measure(
            arguments.model,
            files=arguments.files,
            tokens=tokens,
            points=arguments.points,
            kv_budget=arguments.kv_budget,
        )
        for tokens in arguments.tokens
    ]
    measured = f"trimkv summarize notes.txt {FLAGS.format(kv_budget=arguments.kv_budget)}"
    write_record("bench.points", {"measured": measured, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
