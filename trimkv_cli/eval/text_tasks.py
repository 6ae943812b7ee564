"""The tasks on real text: facts put between its sentences, and asked for in other words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

from trimkv_cli.eval.facts import Fact, draw_facts
from trimkv_cli.eval.instructions import SYSTEMS
from trimkv_cli.eval.samples import Sample
from trimkv_cli.eval.texts import CountTokens, RealText, weave

QUESTIONS = 8  # about one document
_LEAST = 32  # tokens of real text in a document
_AROUND = 48  # tokens of the template and of what is said beside document and question

Make = Callable[[Random, RealText, int, CountTokens, bool, int], list[Sample]]  # the last: the document's number


def draw_documents(
    task: str, *, text: RealText, tokens: int, seed: int, count: CountTokens, chat: bool
) -> Iterator[Sample]:
    """Yield questions about one document after the other, each of about `tokens` tokens, without an end.

    Without `chat` they are texts to continue.
    """
    number = 0
    while True:
        rng = Random(f"trimkv eval {task} {seed} {number}")  # noqa: S311
        for sample in TEXT_TASKS[task](rng, text, tokens, count, chat, number):
            yield replace(sample, document=f"{task}-{seed}-{number}")
        number += 1


def _needle(rng: Random, text: RealText, tokens: int, count: CountTokens, chat: bool, _: int) -> list[Sample]:
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
    head = f"Text:\n{document}\n\n"
    content = f"{head}Question: {fact.asked}"
    return replace(known, messages=({"role": "user", "content": content},), head=len(head))


_BRIEFLY = "Answer with what the text says, in a few words."


def _multi_turn(rng: Random, text: RealText, tokens: int, count: CountTokens, chat: bool, _: int) -> list[Sample]:
    """A chat of four messages with two facts each; two are asked for on the way, the other six are at the end."""
    facts = draw_facts(rng, QUESTIONS)
    rest = sum(count(fact.told) + count(fact.asked) + 16 for fact in facts) + _AROUND
    share = max(_LEAST, (tokens - rest) // _PARTS)
    turns: list[tuple[str, str]] = []
    early = [rng.choice(facts[:2]), rng.choice(facts[2:4])]
    for part in range(_PARTS):
        told = [fact.told for fact in facts[2 * part : 2 * part + 2]]
        turns += [("user", weave(text.stretch(rng, share, count), told, rng)), ("assistant", rng.choice(_HEARD))]
        if part < len(early):
            turns += [("user", f"{early[part].asked} {_BRIEFLY}"), ("assistant", f"{early[part].value}.")]
    late = [fact for fact in facts if fact not in early]
    return [_ask_after(turns, fact, chat) for fact in rng.sample(late, len(late))]


_PARTS = 4
_HEARD = ("All right.", "I have read it.", "Thank you, go on.", "Understood.")


def _ask_after(turns: list[tuple[str, str]], fact: Fact, chat: bool) -> Sample:
    known = Sample(answer=fact.value, also=fact.also)
    if chat:
        messages = (*turns, ("user", f"{fact.asked} {_BRIEFLY}"))
        return replace(known, messages=tuple({"role": role, "content": text} for role, text in messages), head=0)
    told = "".join(f"{'Q' if role == 'user' else 'A'}: {text}\n\n" for role, text in turns)
    head = f"{told}Q:"
    return replace(known, prompt=f"{head} {fact.asked}\n\nA:", head=len(head))


def _instructions(
    rng: Random, text: RealText, tokens: int, count: CountTokens, chat: bool, number: int
) -> list[Sample]:
    """A system message of four rules, a long text, and a question that brings one of the rules into play.

    Messages take turns, so that any ten documents have all of them, and after ten comes the next rule of each.
    """
    system = SYSTEMS[number % len(SYSTEMS)]
    asked = system[number // len(SYSTEMS) % len(system)]
    said = " ".join(one.said for one in system)
    rest = count(said) + count(asked.asked) + _AROUND
    passage = weave(text.stretch(rng, max(_LEAST, tokens - rest), count), [], rng)
    known = Sample(rules=(asked.rule,), max_tokens=_REPLY)
    if not chat:
        head = f"Rules: {said}\n\nText: {passage}\n\nQuestion:"
        return [replace(known, prompt=f"{head} {asked.asked}\nAnswer:", head=len(head))]
    head = f"Text:\n{passage}\n\n"
    messages = ({"role": "system", "content": said}, {"role": "user", "content": f"{head}Question: {asked.asked}"})
    return [replace(known, messages=messages, head=len(head))]


_REPLY = 32  # tokens of a reply


def _summary(rng: Random, text: RealText, tokens: int, count: CountTokens, chat: bool, _: int) -> list[Sample]:
    """A long text with eight points to summarize; what counts is how many of their values the summary says."""
    facts = draw_facts(rng, QUESTIONS)
    rest = sum(count(fact.told) for fact in facts) + _AROUND
    document = weave(text.stretch(rng, max(_LEAST, tokens - rest), count), [fact.told for fact in facts], rng)
    known = Sample(points=tuple(fact.value for fact in facts), max_tokens=_SUMMARY)
    if not chat:
        head = f"Text: {document}\n\n"
        return [replace(known, prompt=f"{head}{_SUMMARIZE}\nSummary:", head=len(head))]
    head = f"{document}\n\n"
    return [replace(known, messages=({"role": "user", "content": head + _SUMMARIZE},), head=len(head))]


_SUMMARY = 256
_SUMMARIZE = (
    "Summarize the text. Keep all codes, names, places, dates, times, prices, numbers and files that it mentions."
)

TEXT_TASKS: dict[str, Make] = {
    "needle": _needle,
    "multi-turn": _multi_turn,
    "instructions": _instructions,
    "summary-recall": _summary,
}
