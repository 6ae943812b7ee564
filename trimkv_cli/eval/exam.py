"""The questions of an evaluation as token ids, before any weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from trimkv_cli.engine.text import Prompt, Text
from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.eval.scoring import POLICIES, Match, Policy
from trimkv_cli.files import as_text
from trimkv_cli.mini import language, words
from trimkv_cli.mini.language import Dialogue, Talk, draw_value, draw_words
from trimkv_cli.request import Request, SamplingParams

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What is asked, as messages or as a text to continue, and the one answer that counts as right.

    `value` is the part of a generated answer that `--match contains` looks for; "" = all of it.
    """

    answer: str
    value: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    prompt: str | None = None


def read_samples(path: str, *, limit: int | None = None) -> list[Sample]:
    """Read JSON lines with `answer` and either `messages` or `prompt`; blank lines are passed over.

    Raises:
        InputError: a file that cannot be read or holds no line, or a bad line, by its number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start}", hint=f"iconv -t UTF-8 {path}") from error
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    samples = [_read_line(line, f"{path}:{number}") for number, line in filled[:limit]]
    if not samples:
        raise InputError(f"{path} holds no questions", hint='a line is {"messages": [...], "answer": "..."}')
    return samples


def _read_line(line: str, where: str) -> Sample:
    try:
        data = json.loads(line)
    except ValueError as error:
        raise _bad(where, f"invalid JSON: {error}") from None
    if not isinstance(data, dict):
        raise _bad(where, "not a JSON object")
    answer, messages, prompt = data.get("answer"), data.get("messages"), data.get("prompt")
    if not isinstance(answer, str) or not answer.strip():
        raise _bad(where, "answer must be a text that is not empty")
    if (messages is None) == (prompt is None):
        raise _bad(where, "give either messages or prompt")
    if prompt is None:
        return Sample(answer=as_text(answer, where), messages=_read_messages(messages, where))
    if not isinstance(prompt, str) or not prompt:
        raise _bad(where, "prompt must be a text that is not empty")
    return Sample(answer=as_text(answer, where), prompt=as_text(prompt, where))


def _read_messages(messages: Any, where: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise _bad(where, "messages must be a list that is not empty")
    for number, message in enumerate(messages):
        plain = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not plain or message.get("role") not in _ROLES:
            raise _bad(where, f"messages[{number}] needs a role ({', '.join(_ROLES)}) and a text as content")
    if messages[-1]["role"] != "user":
        raise _bad(where, "the last message must be the user's")
    return tuple({"role": message["role"], "content": as_text(message["content"], where)} for message in messages)


def _bad(where: str, what: str) -> InputError:
    return InputError(f"{where}: {what}", hint='a line is {"messages": [...], "answer": "..."}')


Make = Callable[[Random, int], Sequence[Sample]]

_FACTS = 6
_STEPS = 12  # lines of a procedure's table
_PROBES = 12
_SMALLEST = 24  # words; less holds no question


def draw_samples(task: str, *, count: int, tokens: int, seed: int, measure: Callable[[Sample], int]) -> list[Sample]:
    """Draw `count` questions, each about a conversation of its own that has about `tokens` tokens by `measure`.

    The first questions are the same whatever `count` is.
    """
    make = TASKS[task]
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

TASKS: dict[str, Make] = {
    "recall": _recall,
    "kv-retrieval": _kv_retrieval,
    "multi-turn": _multi_turn,
    "procedure": _procedure,
}


_SPARE_TOKENS = {"exact": 8, "contains": 64}  # what an answer may have beyond the expected one


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """Say what is asked and under which policies; `samples` None means 100 of a task, all of a file."""

    tasks: tuple[str, ...] = tuple(TASKS)
    data: str | None = None
    context: int = 1000
    samples: int | None = None
    seed: int = 0
    budgets: tuple[str, ...] = ("32", "64", "128")
    policies: tuple[Policy, ...] = POLICIES
    prefill_chunk: int = 32
    match: Match = "exact"
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        unknown = next((task for task in self.tasks if task not in TASKS), None)
        if unknown is not None:
            raise UsageError(f"there is no task {unknown!r}", hint=f"--tasks {','.join(TASKS)}")
        if any(size < 1 for size in (self.context, *(s for s in (self.samples, self.max_tokens) if s is not None))):
            raise UsageError("--context, --samples and --max-tokens need 1 or more", hint="leave out what is 0 or less")
        if not self.budgets and set(self.policies) != {"full"}:
            raise UsageError("no budget is given", hint="--budgets 32,64,128")
        if not self.policies:
            raise UsageError("no policy is given", hint=f"--policies {','.join(POLICIES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSample:
    """A request, the answer that counts as right, and the tokens of the expected text as encoded on its own."""

    request: Request
    answer: str
    answer_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """The questions of one task; `context` is the length that they were made for."""

    task: str
    context: int
    samples: tuple[EncodedSample, ...]

    @property
    def positions(self) -> int:
        return max(
            len(q.request.prompt_token_ids) + max(q.request.params.max_tokens, len(q.answer_ids)) for q in self.samples
        )


def make_exams(options: EvalOptions, text: Text) -> Iterator[Exam]:
    """Make the questions of each task, then those of the user's own file.

    Raises:
        InputError: a file that cannot be read, or a bad line.
        UnsupportedModel: the model has no chat template.
    """

    def measure(sample: Sample) -> int:
        return len(_encode(sample, text).token_ids)

    for task in options.tasks:
        count = options.samples or 100
        samples = draw_samples(task, count=count, tokens=options.context, seed=options.seed, measure=measure)
        yield Exam(task=task, context=options.context, samples=_encode_samples(task, samples, text, options))
    if options.data is not None:
        name = Path(options.data).name
        encoded = _encode_samples(name, read_samples(options.data, limit=options.samples), text, options)
        yield Exam(task=name, context=max(len(q.request.prompt_token_ids) for q in encoded), samples=encoded)


def _encode_samples(task: str, samples: list[Sample], text: Text, options: EvalOptions) -> tuple[EncodedSample, ...]:
    return tuple(_encode_sample(f"{task}-{number}", sample, text, options) for number, sample in enumerate(samples))


def _encode_sample(id: str, sample: Sample, text: Text, options: EvalOptions) -> EncodedSample:
    prompt = _encode(sample, text)
    answer_ids = tuple(text.tokenizer.encode(sample.answer, add_special_tokens=False))
    params = SamplingParams(
        max_tokens=options.max_tokens or len(answer_ids) + _SPARE_TOKENS[options.match],
        temperature=0.0,
        logprobs=0,
        stop=("\n",) if sample.prompt is not None and "\n" not in sample.answer else (),
    )
    request = Request(id=id, prompt_token_ids=prompt.token_ids, prefix_len=prompt.prefix_len, params=params)
    expected = sample.value if options.match == "contains" and sample.value else sample.answer
    return EncodedSample(request=request, answer=expected, answer_ids=answer_ids)


def _encode(sample: Sample, text: Text) -> Prompt:
    if sample.prompt is not None:
        return Prompt(token_ids=tuple(text.encode(sample.prompt)))
    return text.render_chat(sample.messages, think=False)
