"""Record for how long a fact is remembered: told early in a conversation of 50,000 tokens, asked every 5,000.

python -m bench.long_chat --out kernels/bench/results/long-chat-mini.json
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from bench.record import write_record
from trimkv_cli.engine.engine import Engine
from trimkv_cli.eval.scoring import is_right, wilson
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.mini.language import Talk, Utterance, draw_facts
from trimkv_cli.request import Request, SamplingParams

FACTS = 6
TOLD_WITHIN = 500  # tokens
SPARE_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What is said up to each mark, as token ids, and the questions: (token ids of a turn, expected answer)."""

    parts: tuple[tuple[int, ...], ...]
    questions: tuple[tuple[tuple[int, ...], str], ...]


def write_script(engine: Engine, *, seed: int, tokens: int, every: int) -> Script:
    """Tell facts within the first 500 tokens, chat on, and cut the whole at every mark, between two turns."""
    rng = Random(f"bench long chat {seed}")
    talk = Talk(rng, unseen=True, facts=draw_facts(rng, FACTS))
    while talk.told < FACTS:
        talk.tell()
    parts: list[tuple[int, ...]] = []
    part, length = _encode(engine, talk.messages), 0
    assert len(part) <= TOLD_WITHIN, "the facts take more than the first 500 tokens"
    while len(parts) < tokens // every:
        turn = Talk(rng)
        turn.chat()
        part += _encode(engine, turn.messages)
        if length + len(part) >= every * (len(parts) + 1):
            parts, length, part = [*parts, part], length + len(part), ()
    asked = [
        (_encode(engine, [Utterance(role="user", content=f.ask(rng, unseen=True))], answer_next=True), f.answer)
        for f in talk.facts
    ]
    return Script(parts=tuple(parts), questions=tuple(asked))


def _encode(engine: Engine, messages: Sequence[Utterance], *, answer_next: bool = False) -> tuple[int, ...]:
    assert engine.text is not None
    said = [{"role": message.role, "content": message.content} for message in messages]
    ids = engine.text.tokenizer.apply_chat_template(said, add_generation_prompt=answer_next, return_dict=False)
    return tuple(ids)


def read(engine: Engine, script: Script) -> Iterator[int]:
    """Read a script; yield at each mark how many of its questions are answered right.

    Questions are asked aside: the conversation goes on as if they had not been, so no answer refreshes a fact.
    """
    before: str | None = None
    for number, part in enumerate(script.parts):
        now = f"part {number}"
        listen(engine, Request(id=now, prompt_token_ids=part, params=_greedy(1), keep=True, continues=before))
        state = replace(engine.kept.save(now), last_token=None)  # what the model would have said was not said
        engine.kept.release(now)
        right = 0
        for ids, answer in script.questions:
            engine.kept.restore(state, "aside")
            params = _greedy(len(answer) + SPARE_TOKENS)  # a token is a character or more
            said = listen(engine, Request(id="asked", prompt_token_ids=ids, params=params, continues="aside"))
            right += is_right(said, answer)
        engine.kept.restore(state, now)
        before = now
        yield right
    assert before is not None
    engine.kept.release(before)


def listen(engine: Engine, request: Request) -> str:
    """Run one request; return its text."""
    return "".join(event.text for event in engine.generate([request]))


def _greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0)


def measure(options: EngineOptions, *, conversations: int, tokens: int, every: int) -> dict[str, Any]:
    """Return the share of right answers at each mark."""
    engine = load_engine(options)
    marks = [0] * (tokens // every)
    for seed in range(conversations):
        for mark, right in enumerate(read(engine, write_script(engine, seed=seed, tokens=tokens, every=every))):
            marks[mark] += right
    count = conversations * FACTS
    return {
        "policy": "streaming" if options.gates == "streaming" else "gates",
        "kv_budget": engine.facts.plan.run.kv_budget,
        "kv_bytes": engine.kv_bytes,
        "n": count,
        "tokens": [every * (mark + 1) for mark in range(len(marks))],
        "accuracy": [right / count for right in marks],
        "ci95": [wilson(right, count) for right in marks],
    }


def main() -> None:
    """Measure the gates at three budgets, and streaming at the largest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--conversations", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--every", type=int, default=5_000)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for gates, budget in [*(("auto", b) for b in arguments.budgets), ("streaming", max(arguments.budgets))]:
        options = EngineOptions(
            model=arguments.model, gates=gates, kv_budget=str(budget), prefill_chunk=32, max_inflight=1, threads=1
        )
        rows.append(
            measure(options, conversations=arguments.conversations, tokens=arguments.tokens, every=arguments.every)
        )
    measured = f"{FACTS} facts in the first {TOLD_WITHIN} tokens, unseen phrasings, chunk 32, questions asked aside"
    write_record("bench.long_chat", {"measured": measured, "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
