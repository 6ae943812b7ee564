"""The tasks on real text: facts put between its sentences, and asked for in other words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

from trimkv_cli.eval.facts import Fact, draw_facts
from trimkv_cli.eval.rules import Rule
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
    head = f"Text:\n{document}\n\n"
    content = f"{head}Question: {fact.asked}"
    return replace(known, messages=({"role": "user", "content": content},), head=len(head))


_BRIEFLY = "Answer with what the text says, in a few words."


def _multi_turn(rng: Random, text: RealText, tokens: int, count: CountTokens, chat: bool) -> list[Sample]:
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


def _instructions(rng: Random, text: RealText, tokens: int, count: CountTokens, chat: bool) -> list[Sample]:
    """Four rules first, a long text, and then requests, each of which has to be answered by the rules."""
    rules = rng.choice(SYSTEMS)
    system = " ".join(said for said, _ in rules)
    passage = weave(text.stretch(rng, max(_LEAST, tokens - count(system) - _AROUND), count), [], rng)
    known = Sample(rules=tuple(rule for _, rule in rules), max_tokens=_REPLY)
    requests = rng.sample(_REQUESTS, 4)
    if not chat:
        head = f"Rules for the answer: {system}\n\nText: {passage}\n\nTask:"
        return [replace(known, prompt=f"{head} {asked}\nAnswer:", head=len(head)) for asked in requests]
    head, first = f"{passage}\n\n", {"role": "system", "content": system}
    return [
        replace(known, messages=(first, {"role": "user", "content": head + asked}), head=len(head))
        for asked in requests
    ]


_REPLY = 96  # tokens of a reply
_REQUESTS = (
    "What is this text about?",
    "Who or what appears in this text?",
    "Tell me what happens in the text.",
    "Would you recommend this text to a friend?",
    "Which part of the text is the most striking?",
    "Give the text a title and explain it.",
)


def _summary(rng: Random, text: RealText, tokens: int, count: CountTokens, chat: bool) -> list[Sample]:
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

Said = tuple[str, Rule]


def _starts(word: str) -> Said:
    return f'Begin every answer with "{word}".', Rule(kind="starts", value=word)


def _ends(words: str) -> Said:
    return f'End every answer with "{words}".', Rule(kind="ends", value=words)


def _says(words: str) -> Said:
    return f'Use the words "{words}" in every answer.', Rule(kind="says", value=words)


def _avoids(word: str) -> Said:
    return f'Never use the word "{word}".', Rule(kind="avoids", value=word)


def _most(number: int) -> Said:
    return f"No answer may have more than {number} words.", Rule(kind="most-words", value=str(number))


_LOWER: Said = ("Write everything in lower case letters.", Rule(kind="lower-case"))
_UPPER: Said = ("Write everything in capital letters.", Rule(kind="upper-case"))
_DIGITS: Said = ("Write no digits.", Rule(kind="no-digits"))
_COMMAS: Said = ("Use no commas at all.", Rule(kind="no-commas"))
_SHOUTS: Said = ("Use no exclamation marks.", Rule(kind="no-exclamation"))
_LINE: Said = ("Answer in a single paragraph.", Rule(kind="one-line"))
_ASKS: Said = ("Finish with a question to the reader.", Rule(kind="asks"))

SYSTEMS: tuple[tuple[Said, ...], ...] = (
    (_starts("Well"), _ends("over and out"), _avoids("and"), _most(40)),
    (_LOWER, _says("as far as I know"), _COMMAS, _LINE),
    (_starts("Dear reader"), _most(30), _DIGITS, _ASKS),
    (_UPPER, _starts("Attention"), _LINE, _most(25)),
    (_ends("so it is written"), _avoids("text"), _SHOUTS, _most(50)),
    (_says("in a word"), _starts("Honestly"), _COMMAS, _DIGITS),
    (_starts("Arr"), _says("matey"), _most(40), _LINE),
    (_avoids("the"), _ends("thank you"), _most(20), _DIGITS),
    (_starts("Report"), _ends("end of report"), _LINE, _avoids("is")),
    (_LOWER, _ASKS, _most(35), _says("by the way")),
)

TEXT_TASKS: dict[str, Make] = {
    "needle": _needle,
    "multi-turn": _multi_turn,
    "instructions": _instructions,
    "summary-recall": _summary,
}
