"""Write conversations of the synthetic language as JSONL: what the gates of the built-in model learn from.

python -m examples.mini.conversations OUT.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from random import Random

from examples.mini.rows import EARLY, TELLING, make_conversation
from trimkv_cli.files import whole_file
from trimkv_cli.mini.language import TOKENS_PER_WORD, Dialogue

# Half of them hold no more to remember at a time than few slots can: what is worth a slot is learnt best from little.
# The others hold as much as the model was trained on. What must not take a slot is learnt from long notes with few
# points, and from more strange words in the filler than texts have: what is rare there fills a cache in 20,000 tokens.
SPARSE = replace(
    EARLY,
    pairs=0.0,
    summaries=0.75,
    notes=0.05,
    stories=0.05,
    reading=(0.8, 0.98),
    strange=0.2,
    telling=replace(TELLING, openers=0.6, loose_openers=0.5),
    facts=6,
    points=4,
    alike=0.2,
    anagrams=0.1,
)
DENSE = replace(SPARSE, facts=12, points=EARLY.points)


def write_conversations(out: Path, *, count: int, tokens: int, seed: int) -> None:
    """Write `count` conversations, all skills in one, to `out`; few are longer than `tokens` tokens.

    What is cut off asks for what stood before the cut, and teaches nothing.
    """
    rng = Random(seed)
    drawn = (
        make_conversation(rng, int(tokens * rng.uniform(0.8, 1.0) / TOKENS_PER_WORD), rng.choice((SPARSE, DENSE)))
        for _ in range(count)
    )
    write_lines(out, drawn)


def write_lines(out: Path, conversations: Iterable[Dialogue]) -> None:
    """Write each conversation to `out` as a line of messages, the form that `gates train` reads."""
    with whole_file(out) as partial, partial.open("w", encoding="utf-8") as file:
        for conversation in conversations:
            messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
            file.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    """Read the arguments and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=2400)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=20_000)
    arguments = parser.parse_args()
    write_conversations(arguments.out, count=arguments.count, tokens=arguments.tokens, seed=arguments.seed)


if __name__ == "__main__":
    main()
