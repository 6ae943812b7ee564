"""The examination of the built-in model: exact answers on seeds and phrasings that training never uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimkv_cli.mini import language, readings
from trimkv_cli.mini.language import TOKENS_PER_WORD, Conversation
from trimkv_cli.mini.rows import Encoder
from trimkv_cli.mini.sentences import Telling
from trimkv_cli.mini.training import predict

SEED = "exam"
Make = Callable[[Random, int, bool], Conversation]


def _recall(rng: Random, length: int, unseen: bool) -> Conversation:
    return language.make_recall(rng, facts=6, length=length, unseen=unseen)


def _value_first(rng: Random, length: int, unseen: bool) -> Conversation:
    return language.make_recall(rng, facts=6, length=length, unseen=unseen, telling=Telling(value_first=1.0))


def _multi_turn(rng: Random, length: int, unseen: bool) -> Conversation:
    return language.make_multi_turn(rng, facts=6, length=length, unseen=unseen)


def _summary(rng: Random, length: int, unseen: bool) -> Conversation:
    points = max(2, min(12, length // 30))
    return readings.summarize_notes(rng, readings.make_notes(rng, points=points, length=length), unseen=unseen)


def _notes(rng: Random, length: int, unseen: bool) -> Conversation:
    return readings.ask_about(rng, readings.make_notes(rng, points=6, length=length), unseen=unseen)


def _story(rng: Random, length: int, unseen: bool) -> Conversation:
    return readings.ask_about(
        rng, readings.make_story(rng, facts=4, length=length, unseen=unseen), unseen=unseen, before=1.0
    )


def _table(rng: Random, length: int, unseen: bool) -> Conversation:
    return readings.make_table(rng, rows=min(12, length // 6), unseen=unseen)


def _table_backwards(rng: Random, length: int, unseen: bool) -> Conversation:
    return readings.make_table(rng, rows=min(12, length // 6), unseen=unseen, reverse=1.0)


def _steps(rng: Random, length: int, unseen: bool) -> Conversation:
    return readings.make_steps(rng, rows=min(12, length // 6), unseen=unseen)


def _list(rng: Random, length: int, unseen: bool) -> Conversation:
    return readings.make_list(rng, rows=min(12, length // 6), unseen=unseen)


SUBJECTS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "recall": (_recall, (500, 1000, 2000)),
    "recall, value first": (_value_first, (500,)),
    "multi-turn": (_multi_turn, (500, 1000, 2000)),
    "summary": (_summary, (500, 1000, 2000)),
    "notes": (_notes, (500, 1000, 2000)),
    "story": (_story, (100, 1000)),
    "table": (_table, (200,)),
    "table backwards": (_table_backwards, (200,)),
    "steps": (_steps, (200,)),
    "list": (_list, (200,)),
}


def examine(folder: Path, *, questions: int = 200) -> Iterator[dict[str, Any]]:
    """Yield one line per subject, length and kind of phrasing, with the share of answers that are exact."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = Encoder(tokenizer)
    for subject, (make, token_lengths) in SUBJECTS.items():
        for tokens in token_lengths:
            for unseen in (False, True):
                rng = Random(f"{SEED} {subject} {tokens} {unseen}")
                right, asked, seen = 0, 0, []
                while asked < (questions if subject != "summary" else questions // 4):
                    conversation = make(rng, int(tokens / TOKENS_PER_WORD), unseen)
                    marks, count = answers_right(model, encoder, conversation)
                    right, asked = right + sum(marks), asked + len(marks)
                    seen.append(count)
                yield {
                    "subject": subject,
                    "phrasing": "unseen" if unseen else "trained",
                    "tokens": round(sum(seen) / len(seen)),
                    "exact": round(right / asked, 4),
                    "questions": asked,
                }


def answers_right(model: torch.nn.Module, encoder: Encoder, conversation: Conversation) -> tuple[list[bool], int]:
    """Return for each question whether greedy decoding would give its answer, and the tokens of the conversation.

    One pass over the conversation tells it: an answer is exact when each of its tokens, and the end after them, is the
    likeliest after the right tokens before it.
    """
    ids, scored = encoder.encode(conversation.messages)
    row = torch.tensor([ids])
    with torch.no_grad():
        best = predict(model, row, torch.arange(len(ids))[None])[0].argmax(-1).tolist()
    marks: list[bool] = []
    for index in range(1, len(ids)):
        if scored[index]:
            hit = best[index - 1] == ids[index]
            if scored[index - 1]:
                marks[-1] = marks[-1] and hit
            else:
                marks.append(hit)
    return marks, len(ids)
