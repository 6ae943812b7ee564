"""Conversations that gates learn from: real text, with facts put in that are asked for later.

`python -m examples.gates.smollm2.conversations FOLDER OUT.jsonl` writes them; a document is a line, as `trimkv gates
train` reads it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

from examples.gates.smollm2.facts import WORDS, Fact, draw_facts
from examples.gates.smollm2.texts import Passages, read_texts, sentences

CHARACTERS_PER_TOKEN = 4.2
Message = dict[str, str]

# fmt: off
LEADS = (
    "Read this text.", "Here is a text.", "Please read the following carefully.", "Text:", "This is the document:",
    "I will ask you questions about this text.", "Below is a passage.", "Use the text below to answer.", "",
    "Answer the questions from this document.", "Somebody sent me this:", "Context:",
)
CLOSINGS = ("", "", "Question:", "Now answer:", "My question:", "Based on the text above:", "About the text:", "Q:")
THANKS = (
    "Thank you, I have read it.", "I have read the text. What would you like to know?", "OK.", "Understood.",
    "Got it. What is your question?", "All right.", "I see.", "Noted.", "Thanks, go on.",
)
SYSTEMS = (
    "You are a helpful assistant.", "You answer questions about texts, briefly.",
    "Be short and exact.",
    "You are a careful reader. Answer from the text.", "You are an assistant in an archive.",
)
NOTES = ("", "", "", "", "Note: ", "Remember: ", "By the way: ", "Important: ", "Incidentally, ", "P.S. ")
RULES = (  # a rule, and the answer that keeps it
    ("End every answer with the word {w}.", "{a} {w}"),
    ("Begin every answer with {w}:", "{w}: {a}"),
    ("Write your answers in capital letters.", "{A}"),
    ("Address the user as {w}.", "{w}, {a}"),
    ("Put your answer in square brackets.", "[{a}]"),
    ("Finish with a line that says {w}.", "{a}\n{w}"),
    ("Start your answers with a dash.", "- {a}"),
    ("Sign your answers with the name {w}.", "{a}\n{w}"),
)
# fmt: on


def insert(rng: Random, passage: Sequence[str], told: Sequence[str]) -> str:
    """Put each of `told` between two sentences somewhere, or on a line of its own."""
    parts = [(sentence, end) for p in passage for *body, last in [sentences(p)] for sentence, end in
             (*((s, " ") for s in body), (last, "\n\n"))]  # fmt: skip
    for sentence in told:
        place = rng.randrange(len(parts) + 1)
        ending = "\n\n" if rng.random() < 0.25 else " "
        parts.insert(place, (rng.choice(NOTES) + sentence, ending))
    return "".join(sentence + end for sentence, end in parts).strip()


class Writer:
    """Write conversations of about so many tokens."""

    def __init__(self, passages: Passages) -> None:
        self._passages = passages
        self._kinds: list[tuple[float, Callable[[Random, int], list[Message]]]] = [
            (0.46, self.reading),
            (0.18, self.telling),
            (0.10, self.table),
            (0.06, self.code),
            (0.08, self.rules),
            (0.12, self.going_on),
        ]

    def write(self, rng: Random, tokens: int) -> list[Message]:
        weights, kinds = zip(*self._kinds, strict=True)
        (kind,) = rng.choices(kinds, weights)
        return list(kind(rng, round(tokens * CHARACTERS_PER_TOKEN)))

    def reading(self, rng: Random, size: int) -> list[Message]:
        """A text with facts in it, and questions: in the same message, or in the turns behind it."""
        facts = draw_facts(rng, rng.randint(4, 9))
        text = insert(rng, self._passages.draw(rng, size), [fact.tell(rng) for fact in facts])
        rng.shuffle(facts)
        return [*_system(rng, 0.3), *_about(rng, text), *_asked(rng, facts)]

    def telling(self, rng: Random, size: int) -> list[Message]:
        """Facts told over several turns, with text between them, and asked for in between and at the end."""
        facts = draw_facts(rng, rng.randint(4, 8))
        messages, open_facts = _system(rng, 0.4), list[Fact]()
        turns = rng.randint(2, 5)
        for turn in range(turns):
            new = facts[turn::turns]
            open_facts += new
            told = [fact.tell(rng) for fact in new]
            if rng.random() < 0.7:
                content = insert(rng, self._passages.draw(rng, size // turns), told)
            else:
                content = " ".join(told)
                size_left = self._passages.draw(rng, size // turns)
                content = rng.choice(
                    (content + "\n\n" + "\n\n".join(size_left), "\n\n".join(size_left) + "\n\n" + content)
                )
            messages += _turn(content, rng.choice(THANKS))
            if rng.random() < 0.4 and turn < turns - 1:
                messages += _asked(rng, [rng.choice(open_facts)])
        rng.shuffle(facts)
        return [*messages, *_asked(rng, facts)]

    def table(self, rng: Random, size: int) -> list[Message]:
        """A list of keys and values within text; some are asked for."""
        keys = rng.sample(
            [*(word for kind in ("first", "project", "pet", "thing") for word in WORDS[kind])], rng.randint(5, 14)
        )
        values = [
            str(rng.choice((rng.randint(1, 9999), rng.choice(WORDS["pet"]), rng.choice(WORDS["project"]))))
            for _ in keys
        ]
        bar = rng.choice((": ", " | ", " = ", " - ", ", "))
        rows = [f"{key}{bar}{value}" for key, value in zip(keys, values, strict=True)]
        passage = self._passages.draw(rng, size)
        place = rng.randrange(len(passage) + 1)
        text = "\n\n".join([*passage[:place], "\n".join(rows), *passage[place:]])
        messages = [*_system(rng, 0.3), *_about(rng, text)]
        for at in rng.sample(range(len(keys)), min(len(keys), rng.randint(3, 5))):
            question = rng.choice(("Which value does {k} have in the list?", "What stands beside {k}?", "Look up {k}.",
                                   "What is listed for {k}?")).format(k=keys[at])  # fmt: skip
            messages += _turn(question, rng.choice((values[at], rows[at], f"{keys[at]} has {values[at]}.")))
        return messages

    def code(self, rng: Random, size: int) -> list[Message]:
        """A program with constants between texts."""
        names = [
            f"{rng.choice(('MAX', 'MIN', 'DEFAULT', 'BASE', 'LAST'))}_{thing.upper()}"
            for thing in rng.sample(WORDS["thing"], 5)
        ]
        values = [
            str(rng.choice((rng.randint(2, 4000), f'"{rng.choice(WORDS["pet"]).lower()}"', round(rng.random(), 2))))
            for _ in names
        ]
        body = "\n".join(f"{name} = {value}" for name, value in zip(names, values, strict=True))
        function = (
            f"def {rng.choice(WORDS['thing'])}_{rng.choice(('count', 'price', 'name'))}(x):\n    return x * {names[0]}"
        )
        passage = self._passages.draw(rng, size)
        place = rng.randrange(len(passage) + 1)
        text = "\n\n".join([*passage[:place], f"```python\n{body}\n\n{function}\n```", *passage[place:]])
        messages = [*_system(rng, 0.3), *_about(rng, text)]
        for at in rng.sample(range(5), 3):
            question = rng.choice(
                ("What is the value of {n}?", "To what is {n} set in the code?", "Which value has {n}?")
            )
            answer = rng.choice((f"{names[at]} = {values[at]}", values[at], f"{names[at]} is set to {values[at]}."))
            messages += _turn(question.format(n=names[at]), answer)
        return messages

    def rules(self, rng: Random, size: int) -> list[Message]:
        """Rules in the first message, text, and questions whose answers keep them."""
        facts = draw_facts(rng, rng.randint(3, 6))
        chosen = rng.sample(RULES, rng.randint(1, 2))
        words = [rng.choice((*WORDS["pet"], *WORDS["project"], "Over", "Captain", "Regards")) for _ in chosen]
        system = " ".join(rule.format(w=word) for (rule, _), word in zip(chosen, words, strict=True))
        text = insert(rng, self._passages.draw(rng, size), [fact.tell(rng) for fact in facts])
        messages = [{"role": "system", "content": system}, *_about(rng, text)]
        for fact in facts:
            answer = fact.answer(rng)
            for (_, form), word in zip(chosen, words, strict=True):
                answer = form.format(a=answer, A=answer.upper(), w=word)
            messages += _turn(fact.ask(rng), answer)
        return messages

    def going_on(self, rng: Random, size: int) -> list[Message]:
        """A text whose continuation is asked for, so that what prose needs is kept as well."""
        passage = self._passages.draw(rng, size)
        whole = "\n\n".join(passage)
        cut = max(1, len(whole) - rng.randint(500, 900))
        start = whole.rfind(" ", 0, cut)
        request = rng.choice(
            ("Continue this text:", "Go on with the following text.", "Write on:", "Complete the text.")
        )
        before, after = whole[: max(start, 1)], whole[max(start, 1) :].strip()
        return _turn(f"{request}\n\n{before}", after or "The end.")


def _system(rng: Random, share: float) -> list[Message]:
    return [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < share else []


def _about(rng: Random, text: str) -> list[Message]:
    """Give the text in a message that waits for its question, or in a turn of its own."""
    lead = rng.choice(LEADS)
    content = f"{lead}\n\n{text}" if lead else text
    if rng.random() < 0.6:
        return [{"role": "user", "content": content}]
    return _turn(content, rng.choice(THANKS))


def _asked(rng: Random, facts: Sequence[Fact]) -> list[Message]:
    return [message for fact in facts for message in _turn(fact.ask(rng), fact.answer(rng))]


def _turn(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def merged(rng: Random, messages: Sequence[Message]) -> list[Message]:
    """Join messages of one role that follow one another: a text and its first question."""
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            closing = rng.choice(CLOSINGS)
            between = f"\n\n{closing} " if closing else "\n\n"
            joined[-1] = {**message, "content": joined[-1]["content"] + between + message["content"]}
        else:
            joined.append(dict(message))
    return joined


def conversations(
    folder: Path, *, count: int, seed: int, lengths: Sequence[tuple[float, int, int]]
) -> Iterator[list[Message]]:
    """Give `count` conversations; `lengths` are shares of them and the range of tokens of their texts."""
    writer = Writer(Passages(read_texts(folder)))
    for index in range(count):
        rng = Random(f"gates {seed} {index}")
        (chosen,) = rng.choices(lengths, [share for share, _, _ in lengths])
        yield merged(rng, writer.write(rng, rng.randint(*chosen[1:])))


LENGTHS = ((0.25, 350, 600), (0.55, 600, 950), (0.2, 950, 1700))  # share, and tokens of a text
LONGER = ((0.2, 350, 600), (0.45, 600, 950), (0.2, 950, 1700), (0.15, 1700, 2800))


def main() -> None:
    """Write the conversations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the packages lie, or are put")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--long", action="store_true", help="some of the texts longer")
    args = parser.parse_args()
    with args.out.open("w", encoding="utf-8") as file:
        for messages in conversations(
            args.folder, count=args.count, seed=args.seed, lengths=LONGER if args.long else LENGTHS
        ):
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
