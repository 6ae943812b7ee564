"""Record how many questions about a story are answered, asked before it, as `trimkv ask -f` does, and after it.

python -m bench.stories --out kernels/bench/results/stories-mini.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from bench.record import run_trimkv, write_record
from examples.mini.texts import ask_about, make_story
from trimkv_cli.mini.language import TOKENS_PER_WORD

EVAL = "--policies full,gates --budgets 32,64,128 --prefill-chunk 32 --logprob --json -q"
PLACES = {"before": 1.0, "after": 0.0}
FACTS = 4


def measure(model: str, *, stories: int, tokens: int, asked: str) -> list[dict[str, Any]]:
    """Ask one question about each of `stories` stories, seeds and phrasings as no training had them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stories.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in _lines(stories, tokens, asked)), encoding="utf-8")
        rows = run_trimkv(["eval", model, "--data", str(path), *EVAL.split()])["rows"]
    kept = ("policy", "kv_budget", "accuracy", "n", "ci95", "answer_logprob")
    return [{"tokens": tokens, "asked": asked, **{name: row[name] for name in kept}} for row in rows]


def _lines(stories: int, tokens: int, asked: str) -> Iterator[dict[str, Any]]:
    for number in range(stories):
        rng = Random(f"bench stories {tokens} {number}")
        story = make_story(rng, facts=FACTS, length=round(tokens / TOKENS_PER_WORD), unseen=True)
        question, answer = ask_about(rng, story, unseen=True, before=PLACES[asked]).messages[:2]
        yield {"messages": [{"role": "user", "content": question.content}], "answer": answer.content}


def main() -> None:
    """Measure short and long stories, with a full cache and at three budgets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--tokens", type=int, nargs="+", default=[100, 1_000])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = [
        row
        for tokens in arguments.tokens
        for asked in PLACES
        for row in measure(arguments.model, stories=arguments.stories, tokens=tokens, asked=asked)
    ]
    measured = f"trimkv eval --data stories.jsonl {EVAL}"
    write_record("bench.stories", {"measured": measured, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
