"""The tasks on real text: facts put between its sentences, and asked for in other words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

from trimkv_cli.eval.facts import Fact, draw_facts
from trimkv_cli.eval.samples import Sample
from trimkv_cli.eval.texts import CountTokens, RealText, weave

QUESTIONS = 8  # about one document
_LEAST = 32  # tokens of real text in a document
_AROUND = 48  # tokens of the template and of what is said beside document and question

Make = Callable[[Random, RealText, int, CountTokens, bool], list[Sample]]


def draw_documents(
    task: str, *, text: RealText, tokens: int, seed: int, count: CountTokens, chat: bool
) -> Iterator[Sample]:
    """Yield questions about one document after the other, each of about `tokens` tokens, without an end.

    Without `chat` they are texts to continue.
    """
    number = 0
    while True:
        rng = Random(f"trimkv eval {task} {seed} {number}")  # noqa: S311
        for sample in TEXT_TASKS[task](rng, text, tokens, count, chat):
            yield replace(sample, document=f"{task}-{seed}-{number}")
        number += 1


def _needle(rng: Random, text: RealText, tokens: int, count: CountTokens, chat: bool) -> list[Sample]:
    """One document with eight facts, and a question for each."""
    facts = draw_facts(rng, QUESTIONS)
    rest = sum(count(fact.told) for fact in facts) + max(count(fact.asked) for fact in facts) + _AROUND
    document = weave(text.stretch(rng, max(_LEAST, tokens - rest), count), [fact.told for fact in facts], rng)
    return [_ask(document, fact, chat) for fact in facts]


def _ask(document: str, fact: Fact, chat: bool) -> Sample:
    known = Sample(answer=fact.value, also=fact.also)
    if not chat:
        head = f"Text: {document}\n\nQuestion:"
        return replace(known, prompt=f"{head} {fact.asked}\nAnswer:", head=len(head))
    head = f"{document}\n\n"
    content = f"{head}{fact.asked} {_BRIEFLY}"
    return replace(known, messages=({"role": "user", "content": content},), head=len(head))


_BRIEFLY = "Answer with what the text says, in a few words."

TEXT_TASKS: dict[str, Make] = {"needle": _needle}
