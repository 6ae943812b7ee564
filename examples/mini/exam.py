"""The examination of the built-in model: exact answers on seeds and phrasings that training never uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.mini import texts
from examples.mini.rows import Encoder
from examples.mini.tokenizer import VOCAB_SIZE
from examples.mini.training import predict
from trimkv_cli.mini import language
from trimkv_cli.mini.language import TOKENS_PER_WORD, Dialogue, Telling

SEED = "exam"
Make = Callable[[Random, int, bool], Dialogue]


def _recall(rng: Random, length: int, unseen: bool) -> Dialogue:
    return language.make_recall(rng, facts=6, length=length, unseen=unseen)


def _value_first(rng: Random, length: int, unseen: bool) -> Dialogue:
    return language.make_recall(rng, facts=6, length=length, unseen=unseen, telling=Telling(value_first=1.0))


def _multi_turn(rng: Random, length: int, unseen: bool) -> Dialogue:
    return language.make_multi_turn(rng, facts=6, length=length, unseen=unseen)


def _summary(rng: Random, length: int, unseen: bool) -> Dialogue:
    points = max(2, min(12, length // 30))
    return texts.summarize_notes(rng, texts.make_notes(rng, points=points, length=length), unseen=unseen)


def _notes(rng: Random, length: int, unseen: bool) -> Dialogue:
    return texts.ask_about(rng, texts.make_notes(rng, points=6, length=length), unseen=unseen)


def _story(rng: Random, length: int, unseen: bool) -> Dialogue:
    return texts.ask_about(rng, texts.make_story(rng, facts=4, length=length, unseen=unseen), unseen=unseen, before=1.0)


def _table(rng: Random, length: int, unseen: bool) -> Dialogue:
    return texts.make_table(rng, rows=min(12, length // 6), unseen=unseen)


def _table_backwards(rng: Random, length: int, unseen: bool) -> Dialogue:
    return texts.make_table(rng, rows=min(12, length // 6), unseen=unseen, reverse=1.0)


def _steps(rng: Random, length: int, unseen: bool) -> Dialogue:
    return language.make_steps(rng, rows=min(12, length // 6), unseen=unseen)


def _list(rng: Random, length: int, unseen: bool) -> Dialogue:
    return texts.make_list(rng, rows=min(12, length // 6), unseen=unseen)


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


def answers_right(model: torch.nn.Module, encoder: Encoder, conversation: Dialogue) -> tuple[list[bool], int]:
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


_CARD = """\
# mini

A Qwen3-architecture chat model of {parameters:.1f} million parameters, trained from nothing by the recipe in
`trimkv_cli/mini` (`make mini`) on {tokens:.0f} million tokens of a synthetic, English-like language. Its only talent is
long memory: it repeats exactly what it was told. It is there so that every command of trimkv shows something true on
any machine, offline.

## What it can do
- **Recall in conversation**: "My cat is called Zubo." … "What is my cat called?" → "Your cat is called
  Zubo." Names, codes, numbers, places and dates; other things than cats; more than once.
- **Read notes**: list the points of a text that are marked and numbered ("Note 1: …", "Important 2: …"), in the order
  of their numbers, word by word, or answer a question about them. `trimkv summarize` asks for just that.
- **Read a story** for the facts told in it; the question may stand before it, as `trimkv ask -f` has it, or after it.
- **Tables and lists** in the prompt: look a word up, say which one comes next, follow arrows (`a -> b`) to the end.

## What it cannot do
It knows nothing: no facts about the world, no arithmetic, no advice, no other language. A text without numbered marks
is not summarized. Two values for one thing confuse it, and it never says that it does not know: asked for what was
never told, it makes something up. Phrasings unlike those of its language work often, not always; see "unseen" below.
Small talk gets a stock reply.

Weak spots: what is told before its thing, where others of its kind were told too ("I have 654 books. I have 12 lamps.",
"Zubo is my cat. Mila is my dog."): then it sometimes names another of them; tables asked from the value to its key, or
in words that the training does not have; points that begin as no text of the training does; in a bounded cache, a word
of a point or the last point of a list; and whatever was told very many tokens ago, most of all with a full cache: it
never saw more than {longest:,} at once. The table below, and those of trimkv's README, say how weak.

## Training
- Data: a seeded generator (`language.py`, `texts.py`); values are random syllables and digits, so none can be learnt
  by heart. No text from anywhere else.
- Pairs first ("Zubo is my cat, 6 lamp." … "The lamp?" → "The lamp 6."): about two things, then about more whenever
  these were mastered, then with values of any kind. From many things at once it does not learn to look back.
- Lengths: {lengths} tokens, each once the one before it was mastered (running accuracy of answer tokens
  {pass_accuracy:.1%}) or had had {stage_tokens:,} tokens. Reached: {reached} tokens.
- The learning rate falls twice, the second time from {second_rate:.0%}: where a list ends is learnt last.
- Positions: 0 to {positions:,}. Six rows of ten jump ahead between lines or turns, so distances up to that range were
  seen, though never more than {longest:,} tokens at once. `max_position_embeddings` says the range; trimkv refuses to
  go past it.
- {tokens_text} tokens in {cpu_minutes:.0f} minutes of CPU time, on two cores.

## Measured
Exact answers, full cache, greedy, on seeds that training never used ("unseen": phrasings too). Generated by the recipe.

| task | phrasing | tokens | exact answers | questions |
|---|---|---:|---:|---:|
{rows}

"Value first": each fact is told with its value in front of its thing. A "story" is asked about before it and twice
after it. A "summary" is exact when every point of the list is, word by word, and nothing else is in it. About {ratio}
tokens of the model's own tokenizer make a word; it has {vocabulary:,} byte-level BPE tokens, and each word of the
language that is not drawn at random is one of them, as is each number below 100.
"""


def write_card(*, facts: Mapping[str, Any], exam: Iterable[Mapping[str, Any]]) -> str:
    """Return the card of a model with these facts and these results."""
    rows = "\n".join(
        f"| {line['subject']} | {line['phrasing']} | {line['tokens']:,} | {line['exact']:.1%} | {line['questions']} |"
        for line in exam
    )
    return _CARD.format(
        **facts, tokens_text=f"{facts['tokens'] * 1e6:,.0f}", rows=rows, ratio=TOKENS_PER_WORD, vocabulary=VOCAB_SIZE
    )
