"""The tasks in mini's own language: conversations of random words that tell what is asked for later."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

from trimkv_cli.eval.samples import Sample
from trimkv_cli.mini import language, words
from trimkv_cli.mini.language import Dialogue, Talk, draw_value, draw_words

Make = Callable[[Random, int], Sequence[Sample]]

_FACTS = 6
_STEPS = 12  # lines of a procedure's table
_PROBES = 12
_SMALLEST = 24  # words; less holds no question


def draw_mini(task: str, *, count: int, tokens: int, seed: int, measure: Callable[[Sample], int]) -> list[Sample]:
    """Draw `count` questions, each about a conversation of its own that has about `tokens` tokens by `measure`.

    The first questions are the same whatever `count` is.
    """
    make = MINI_TASKS[task]
    size = _fit(make, task, tokens, measure)
    rngs = (_rng(task, seed, index) for index in range(count))
    return [rng.choice(make(rng, size)) for rng in rngs]


def _rng(*key: object) -> Random:
    """Seed with a text, which no training does."""
    return Random(" ".join(map(str, ("trimkv eval", *key))))  # noqa: S311


def _fit(make: Make, task: str, tokens: int, measure: Callable[[Sample], int]) -> int:
    """Find the size whose longest questions have `tokens` tokens on average."""
    size = max(_SMALLEST, tokens / language.TOKENS_PER_WORD)
    for _ in range(3):
        longest = [make(_rng(task, "size", index), round(size))[-1] for index in range(_PROBES)]
        size = max(_SMALLEST, size * tokens * _PROBES / sum(map(measure, longest)))
    return round(size)


def _recall(rng: Random, size: int) -> list[Sample]:
    """Six facts in the first half of a conversation, one question at its end."""
    return _samples(language.make_recall(rng, facts=_FACTS, length=size, questions=1, unseen=True))


def _multi_turn(rng: Random, size: int) -> list[Sample]:
    """Questions all along a conversation; earlier ones stand in it with their right answers."""
    while True:
        samples = _samples(language.make_multi_turn(rng, facts=_FACTS, length=size, unseen=True))
        if samples:
            return samples


def _kv_retrieval(rng: Random, size: int) -> list[Sample]:
    """A long table of random words and random values, and then the question for one of them."""
    keys = draw_words(rng, max(2, size // 2))
    values = [draw_value(rng, rng.choice(("number", "code", "name"))) for _ in keys]
    bar = rng.choice((": ", " | ", " = "))
    table = [rng.choice(words.TABLE_TITLES), *(f"{key}{bar}{value}" for key, value in zip(keys, values, strict=True))]
    asked = rng.randrange(len(keys))
    question = rng.choice(words.UNSEEN_LOOKUPS).format(k=keys[asked])
    content = "\n".join(table) + f"\n\n{question}"
    answer = f"{keys[asked]}{bar}{values[asked]}"  # the line itself, as the built-in model says it
    return [Sample(messages=({"role": "user", "content": content},), answer=answer, value=values[asked])]


def _procedure(rng: Random, size: int) -> list[Sample]:
    """Talk of other things, then a table of arrows to follow step by step."""
    steps = language.make_steps(rng, rows=max(3, min(_STEPS, size // 8)), unseen=True)
    talk = Talk(rng)
    length = size - sum(len(message.content.split()) for message in steps.messages)
    while talk.words < length:
        talk.chat()
    return _samples(Dialogue(messages=(*talk.messages, *steps.messages)))


def _samples(conversation: Dialogue) -> list[Sample]:
    """Make each question of a conversation one sample: everything before it, the question, its answer."""
    messages = tuple({"role": message.role, "content": message.content} for message in conversation.messages)
    return [
        Sample(messages=messages[: asked.turn], answer=asked.answer, value=_value(asked.answer))
        for asked in conversation.questions
    ]


def _value(answer: str) -> str:
    """Find what was told within the sentence that answers, "" where the answer is no such sentence."""
    found = (pattern.fullmatch(answer) for pattern in _ANSWERS)
    return next((match["v"] for match in found if match), "")


_ANSWERS = [
    re.compile(re.escape(template).replace(r"\{t\}", ".+").replace(r"\{v\}", "(?P<v>.+)"))
    for template in dict.fromkeys(relation.answer for relation in words.RELATIONS)
]

MINI_TASKS: dict[str, Make] = {
    "recall": _recall,
    "kv-retrieval": _kv_retrieval,
    "mini-multi-turn": _multi_turn,
    "procedure": _procedure,
}
