"""The questions of an evaluation as token ids, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trimkv_cli.engine.request import Request, SamplingParams
from trimkv_cli.engine.text import Prompt, Text
from trimkv_cli.errors import UsageError
from trimkv_cli.eval.cases import Case, read_cases
from trimkv_cli.eval.results import POLICIES, Policy
from trimkv_cli.eval.scoring import Match
from trimkv_cli.eval.tasks import TASKS, make_cases

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
class Question:
    """A request, the answer that counts as right, and the tokens of the expected text as encoded on its own."""

    request: Request
    answer: str
    answer_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """The questions of one task; `context` is the length that they were made for."""

    task: str
    context: int
    questions: tuple[Question, ...]

    @property
    def positions(self) -> int:
        """How long the longest sequence may become."""
        return max(
            len(q.request.prompt_token_ids) + max(q.request.params.max_tokens, len(q.answer_ids))
            for q in self.questions
        )


def make_exams(options: EvalOptions, text: Text) -> Iterator[Exam]:
    """Make the questions of each task, then those of the user's own file.

    Raises:
        InputError: a file that cannot be read, or a bad line.
        UnsupportedModel: the model has no chat template.
    """

    def measure(case: Case) -> int:
        return len(_encode(case, text).token_ids)

    for task in options.tasks:
        count = options.samples or 100
        cases = make_cases(task, count=count, tokens=options.context, seed=options.seed, measure=measure)
        yield Exam(task=task, context=options.context, questions=_questions(task, cases, text, options))
    if options.data is not None:
        name = Path(options.data).name
        questions = _questions(name, read_cases(options.data, limit=options.samples), text, options)
        yield Exam(task=name, context=max(len(q.request.prompt_token_ids) for q in questions), questions=questions)


def _questions(task: str, cases: list[Case], text: Text, options: EvalOptions) -> tuple[Question, ...]:
    return tuple(_question(f"{task}-{number}", case, text, options) for number, case in enumerate(cases))


def _question(id: str, case: Case, text: Text, options: EvalOptions) -> Question:
    prompt = _encode(case, text)
    answer_ids = tuple(text.tokenizer.encode(case.answer, add_special_tokens=False))
    params = SamplingParams(
        max_tokens=options.max_tokens or len(answer_ids) + _SPARE_TOKENS[options.match],
        temperature=0.0,
        logprobs=0,
        stop=("\n",) if case.prompt is not None and "\n" not in case.answer else (),
    )
    request = Request(id=id, prompt_token_ids=prompt.token_ids, prefix_len=prompt.prefix_len, params=params)
    expected = case.value if options.match == "contains" and case.value else case.answer
    return Question(request=request, answer=expected, answer_ids=answer_ids)


def _encode(case: Case, text: Text) -> Prompt:
    if case.prompt is not None:
        return Prompt(token_ids=tuple(text.encode(case.prompt)))
    return text.render_chat(case.messages, think=False)
