"""The questions of an evaluation as token ids, before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from trimkv_cli.engine.text import Prompt, Text
from trimkv_cli.errors import UsageError
from trimkv_cli.eval.mini_tasks import MINI_TASKS, draw_mini
from trimkv_cli.eval.samples import Match, Sample, by_task, read_samples
from trimkv_cli.eval.scoring import POLICIES, Policy
from trimkv_cli.eval.text_tasks import TEXT_TASKS, draw_documents
from trimkv_cli.eval.texts import RealText
from trimkv_cli.request import Request, SamplingParams

PPL = "ppl"
TASKS = (*TEXT_TASKS, PPL, *MINI_TASKS)
_SAMPLES = 100
_PROBES = ("What is it?", "1")  # two questions that share no token
_SPARE_TOKENS = {"exact": 8, "contains": 24}  # what an answer may have beyond the expected one


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """Say what is asked and under which policies; `samples` None means 100 of a task, all of a file.

    `text` are files of real text, none for the sample that comes along. Without `match` answers about real text are
    looked for within what is said, and all others have to be said exactly.
    """

    tasks: tuple[str, ...] = ("needle",)
    text: tuple[str, ...] = ()
    data: str | None = None
    context: int = 1000
    samples: int | None = None
    seed: int = 0
    budgets: tuple[str, ...] = ("32", "64", "128")
    policies: tuple[Policy, ...] = POLICIES
    prefill_chunk: int = 32
    match: Match | None = None
    max_tokens: int | None = None
    logprob: bool = False

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
    """A question, its request, and the tokens of the expected text as encoded on its own.

    `frame_len` counts the tokens of a prompt for a summary without the text.
    """

    sample: Sample
    request: Request
    answer_ids: tuple[int, ...]
    frame_len: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """The questions of one task; `context` is the length that they were made for, `text` the hash of real text."""

    task: str
    context: int
    match: Match
    samples: tuple[EncodedSample, ...]
    text: str | None = None

    @property
    def summarizes(self) -> bool:
        """Whether every question is for a summary of a text, which may be read part by part."""
        return all(q.sample.text_to_summarize for q in self.samples)

    @property
    def positions(self) -> int:
        return max(
            len(q.request.prompt_token_ids) + max(q.request.params.max_tokens, len(q.answer_ids)) for q in self.samples
        )


def make_exams(options: EvalOptions, text: Text) -> Iterator[Exam]:
    """Make the questions of each task, then those of the user's own file, by its tasks.

    Raises:
        InputError: a file that cannot be read, or a bad line; a text that is too short.
        UnsupportedModel: the model has no chat template.
    """
    real = RealText.read(options.text) if any(task in TEXT_TASKS for task in options.tasks) else None
    for task in options.tasks:
        if task == PPL:
            continue
        if task in TEXT_TASKS:
            assert real is not None
            samples = _draw_real(task, real, text, options)
            yield _exam(task, samples, text, options, "contains", context=options.context, digest=real.digest)
        else:
            yield _exam(task, _draw_mini(task, text, options), text, options, "exact", context=options.context)
    if options.data is not None:
        for task, given in by_task(read_samples(options.data), other=Path(options.data).name).items():
            if task in options.tasks:
                raise UsageError(f"{task} is asked by --tasks and by --data", hint=f"leave {task} out of --tasks")
            yield _exam(task, given[: options.samples], text, options, given[0].match or "exact")


def _draw_real(task: str, real: RealText, text: Text, options: EvalOptions) -> list[Sample]:
    def count(sentence: str) -> int:
        return len(text.tokenizer.encode(f" {sentence}", add_special_tokens=False))

    drawn = draw_documents(
        task, text=real, tokens=options.context, seed=options.seed, count=count, chat=bool(text.template)
    )
    return list(islice(drawn, options.samples or _SAMPLES))


def _draw_mini(task: str, text: Text, options: EvalOptions) -> list[Sample]:
    def measure(sample: Sample) -> int:
        return len(_encode(sample, text).token_ids)

    count = options.samples or _SAMPLES
    return draw_mini(task, count=count, tokens=options.context, seed=options.seed, measure=measure)


def _exam(
    task: str,
    samples: Sequence[Sample],
    text: Text,
    options: EvalOptions,
    match: Match,
    *,
    context: int | None = None,
    digest: str | None = None,
) -> Exam:
    match = options.match or match
    encoded = tuple(_encode_sample(task, number, sample, text, options, match) for number, sample in enumerate(samples))
    longest = max(len(q.request.prompt_token_ids) for q in encoded)
    return Exam(task=task, context=longest if context is None else context, match=match, samples=encoded, text=digest)


def _encode_sample(
    task: str, number: int, sample: Sample, text: Text, options: EvalOptions, match: Match
) -> EncodedSample:
    id = f"{task}-{number}"
    prompt = _encode(sample, text)
    answer_ids = tuple(text.tokenizer.encode(sample.answer, add_special_tokens=False))
    params = SamplingParams(
        max_tokens=options.max_tokens or sample.max_tokens or len(answer_ids) + _SPARE_TOKENS[match],
        temperature=0.0,
        logprobs=0 if options.logprob else None,
        stop=("\n",) if sample.prompt is not None and "\n" not in sample.answer and not sample.points else (),
    )
    request = Request(
        id=id,
        prompt_token_ids=prompt.token_ids,
        prefix_len=prompt.prefix_len,
        document_len=_document_len(sample, prompt, text),
        params=params,
    )
    sample = replace(sample, id=sample.id or id, task=task, match=match)
    frame_len = len(_encode(sample.about(""), text).token_ids) if sample.text_to_summarize else 0
    return EncodedSample(sample=sample, request=request, answer_ids=answer_ids, frame_len=frame_len)


def _document_len(sample: Sample, prompt: Prompt, text: Text) -> int:
    """Return how many tokens are the same whatever is asked after the sample's head, 0 where it has none."""
    if sample.head is None:
        return 0
    asked = sample.last[sample.head :]
    gap = asked[: len(asked) - len(asked.lstrip())]
    probes = (_encode(sample.ending(gap + question), text).token_ids for question in _PROBES)
    same = 0
    for one, other, own in zip(*probes, prompt.token_ids, strict=False):
        if not one == other == own:
            break
        same += 1
    return min(same, len(prompt.token_ids) - 1)


def _encode(sample: Sample, text: Text) -> Prompt:
    if sample.prompt is not None:
        return Prompt(token_ids=tuple(text.encode(sample.prompt)))
    return text.render_chat(sample.messages, think=False)
