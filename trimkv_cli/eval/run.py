"""The same questions under every policy and budget, around one loaded model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.text import Text
from trimkv_cli.errors import ContextOverflow, UnsupportedModel, UsageError
from trimkv_cli.eval.exam import PPL, EncodedSample, EvalOptions, Exam, make_exams
from trimkv_cli.eval.perplexity import draw_text, interval_of_mean, nats
from trimkv_cli.eval.samples import export_line
from trimkv_cli.eval.scoring import EvalResult, interval, judge
from trimkv_cli.eval.setups import Setup, check_pins, plan_setups, policy_gates
from trimkv_cli.eval.texts import RealText
from trimkv_cli.events import Answer
from trimkv_cli.loading.assemble import assemble
from trimkv_cli.loading.loader import Parts, load_parts, load_text
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import Source
from trimkv_cli.request import Request
from trimkv_cli.streams import Every

Say = Callable[[str], None]
Summarize = Callable[[Engine, Sequence[EncodedSample]], Iterator[tuple[str, Answer]]]  # by the requests' ids

_SAY_EVERY_S = 10.0


def evaluate(
    source: Source, engine: EngineOptions, asked: EvalOptions, *, say: Say, summarize: Summarize | None = None
) -> list[EvalResult]:
    """Return the rows by task, in the order in which policies and budgets were asked for; `say` gets progress.

    `summarize` is how map-reduce answers.

    Raises:
        UsageError: gates that are not trained, compared as if they were; a bad line of the user's file.
        ContextOverflow: a context, or a prompt, past the model's positions.
        DoesNotFit: one of the caches.
    """
    if "gates" in asked.policies and not source.gate.trained:
        raise UsageError(f"{source.gate.id} is no trained gate", hint="--policies full,streaming,random")
    if "static" in asked.policies and not source.gate.by_others:
        raise UsageError(f"{source.gate.id} holds no gates of others", hint="--gates with a KVzap or Fast KVzip folder")
    if asked.tasks and asked.context > source.spec.max_positions:
        raise ContextOverflow(
            f"a context of {asked.context:,} is past the model's {source.spec.max_positions:,} positions",
            hint=f"--context {source.spec.max_positions // 2}",
        )
    text = _text(source, engine)
    exams = list(make_exams(asked, text))
    reading = _Reading.of(asked, text) if PPL in asked.tasks else None
    positions = max([exam.positions for exam in exams] + ([asked.context] if reading is not None else []))
    options, setups = plan_setups(source, engine, asked, exams, positions)
    check_pins(setups, exams)
    parts = load_parts(source, options)
    for remark in _remarks(parts, setups, asked):
        say(remark)
    rows: dict[tuple[str, int], EvalResult] = {}
    for number, setup in sorted(enumerate(setups), key=lambda pair: pair[1].slots):
        with closing(_engine(parts, setup, asked, options, positions)) as llm:
            for exam in filter(setup.asks, exams):
                rows[exam.task, number] = _measure(llm, setup, exam, asked, say, summarize)
            if reading is not None and setup.policy != "map-reduce":
                rows[PPL, number] = _read(llm, setup, reading, asked, say)
        del llm  # before the next one's cache is allocated
    tasks = [exam.task for exam in exams] + ([PPL] if reading is not None else [])
    asked_of = [(task, number) for task in tasks for number in range(len(setups))]
    return _with_ratios([rows[key] for key in asked_of if key in rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """A long text to read, and the hash of what it is from."""

    request: Request
    digest: str

    @classmethod
    def of(cls, asked: EvalOptions, text: Text) -> _Reading:
        real = RealText.read(asked.text)
        request = draw_text(real, text, tokens=asked.context, seed=asked.seed)
        return cls(request=request, digest=real.digest)


def _read(engine: Engine, setup: Setup, reading: _Reading, asked: EvalOptions, say: Say) -> EvalResult:
    values = nats(engine, reading.request)
    mean = sum(values) / len(values)
    say(f"{PPL} {setup}: {math.exp(mean):.2f} ({mean:.3f} nats a token)")
    return EvalResult(
        task=PPL,
        accuracy=None,
        n=len(values),
        ci95=interval_of_mean(values),
        answer_logprob=None,
        decode_tps=0.0,
        peak_bytes=engine.peak_bytes,
        context=asked.context,
        prompt_tokens=len(reading.request.prompt_token_ids),
        documents=1,
        text=reading.digest,
        nats=mean,
        **_of_setup(setup, asked),
    )


def _of_setup(setup: Setup, asked: EvalOptions) -> dict[str, Any]:
    run = setup.plan.run
    return {
        "policy": setup.policy,
        "kv_budget": None if setup.policy == "full" else run.kv_budget,
        "kv_bytes": run.kv_bytes_per_row,
        "prefill_chunk": asked.prefill_chunk,
        "seed": asked.seed,
        "weights": run.precision,
        "bits_per_weight": run.bits_per_weight,
        "pins": str(run.pins),
    }


def _with_ratios(rows: list[EvalResult]) -> list[EvalResult]:
    """Compare each perplexity with that of the full cache, where there is one."""
    full = next((row.nats for row in rows if row.policy == "full" and row.nats is not None), None)
    if full is None:
        return rows
    return [row if row.nats is None else replace(row, ratio=math.exp(row.nats - full)) for row in rows]


def export(source: Source, engine: EngineOptions, asked: EvalOptions) -> list[str]:
    """Return the questions as JSON lines, as another program may ask them; raises as `evaluate` does."""
    if PPL in asked.tasks:
        raise UsageError("ppl asks no questions to write", hint=f"leave {PPL} out of --tasks")
    return [
        export_line(
            q.sample,
            context=exam.context,
            seed=asked.seed,
            max_tokens=q.request.params.max_tokens,
            stop=q.request.params.stop,
            document_len=q.request.document_len,
            prompt_token_ids=q.request.prompt_token_ids,
        )
        for exam in make_exams(asked, _text(source, engine))
        for q in exam.samples
    ]


def _text(source: Source, options: EngineOptions) -> Text:
    text = load_text(source, trust_remote_code=options.trust_remote_code)
    if text is None:
        raise UnsupportedModel(f"{source.model_id} has no tokenizer", hint="take a folder with tokenizer.json")
    return text


def _remarks(parts: Parts, setups: list[Setup], asked: EvalOptions) -> Iterator[str]:
    """Yield what a user should know once: of the model, of its gates, and of each budget."""
    yield from parts.facts.notes
    parted = sum(setup.policy == "map-reduce" for setup in setups)
    if "map-reduce" in asked.policies and parted < len(asked.budgets):
        yield "map-reduce is left out where a part of the text and its summary have no room"
    run = parts.facts.plan.run
    if run.form != "none":
        yield f"{run.precision} weights of {run.bits_per_weight} bits"
    loading = {warning.message for warning in parts.facts.plan.warnings}  # of a plan that nothing runs under
    own = [warning.message for warning in parts.facts.warnings if warning.message not in loading]
    planned = [warning.message for setup in setups for warning in setup.plan.warnings]
    yield from (f"warning: {message}" for message in dict.fromkeys([*own, *planned]))


def _engine(parts: Parts, setup: Setup, asked: EvalOptions, options: EngineOptions, positions: int) -> Engine:
    plan = replace(setup.plan, run=replace(setup.plan.run, prefill_chunk=asked.prefill_chunk))
    facts = replace(parts.facts, plan=plan)
    if setup.policy == "map-reduce":
        facts = replace(facts, max_positions=setup.slots)  # what a part and its summary have to fit
    return assemble(
        parts.model,
        policy_gates(setup.policy, parts, positions=positions, seed=asked.seed),
        facts,
        text=parts.text,
        kv_dtype=parts.kv_dtype,
        deterministic=options.deterministic,
        prefill_tokens=setup.plan.run.prefill_chunk,
    )


def _measure(
    engine: Engine, setup: Setup, exam: Exam, asked: EvalOptions, say: Say, summarize: Summarize | None
) -> EvalResult:
    before = engine.stats
    name = f"{exam.task} {setup}"
    if setup.policy == "map-reduce":
        assert summarize is not None, "map-reduce is asked for with a way to do it"
        answers = dict(summarize(engine, exam.samples))
        if len(answers) < len(exam.samples):
            say(f"{name}: {len(exam.samples) - len(answers)} texts have no summary, as their parts' were no shorter")
    else:
        answers = dict(_ask(engine, exam.samples, lambda done: say(f"{name}: {done} of {len(exam.samples)} answered")))
    said = [answers[q.request.id].text if q.request.id in answers else "" for q in exam.samples]
    right = [judge(text, q.sample, exam.match) for text, q in zip(said, exam.samples, strict=True)]
    count, seconds = len(exam.samples), engine.stats.decode_s - before.decode_s
    tokens = engine.stats.decode_tokens - before.decode_tokens
    peak_bytes = engine.peak_bytes
    say(f"{name}: {sum(right):g} of {count} right")
    documents = [q.sample.document or q.sample.id for q in exam.samples]
    return EvalResult(
        task=exam.task,
        accuracy=sum(right) / count,
        n=count,
        ci95=interval(right, documents),
        answer_logprob=_answer_logprob(engine, exam.samples, answers, say) if asked.logprob else None,
        decode_tps=tokens / seconds if seconds else 0.0,
        peak_bytes=peak_bytes,
        context=exam.context,
        prompt_tokens=sum(len(q.request.prompt_token_ids) for q in exam.samples) / count,
        documents=len(set(documents)),
        answer_tokens=sum(len(answer.token_ids) for answer in answers.values()) / count,
        match=exam.match,
        text=exam.text,
        **_of_setup(setup, asked),
    )


def _answer_logprob(
    engine: Engine, samples: tuple[EncodedSample, ...], said: dict[str, Answer], say: Say
) -> float | None:
    try:
        return mean_logprob(engine, samples, said)
    except UsageError as error:
        say(f"warning: no log-likelihood of the answers: {error.message}")
        return None


def _ask(
    engine: Engine, samples: tuple[EncodedSample, ...], progress: Callable[[int], None]
) -> Iterator[tuple[str, Answer]]:
    """Yield (request id, answer) as answers are done; `progress` gets their number now and then."""
    answers = {sample.request.id: Answer(sample.request) for sample in samples}
    clock, done = Every(_SAY_EVERY_S), 0
    for event in engine.generate(sample.request for sample in samples):
        answers[event.request_id].take(event)
        if event.fault is not None:
            raise event.fault
        if event.finish_reason is not None:
            done += 1
            yield event.request_id, answers.pop(event.request_id)
        if clock.due():
            progress(done)


def mean_logprob(engine: Engine, samples: Sequence[EncodedSample], said: Mapping[str, Answer]) -> float | None:
    """Return the mean log probability of a token of the expected answers, in nats; None without any.

    Where the model said the expected tokens by itself, they need no second reading; the other questions are read again
    with the answer put into the model's mouth.

    Raises:
        UsageError: the tokenizer cannot be held to a text.
    """
    samples = [q for q in samples if q.answer_ids]
    if not samples:
        return None
    own = {q.request.id: said[q.request.id].logprobs[: len(q.answer_ids)] for q in samples if _is_own(q, said)}
    forced = {q.request.id: Answer(_with_answer(q)) for q in samples if q.request.id not in own}
    for event in engine.generate(answer.request for answer in forced.values()):
        if event.fault is not None:
            raise event.fault
        forced[event.request_id].take(event)
    heard = (*own.values(), *(answer.logprobs for answer in forced.values()))
    values = [one.logprob for logprobs in heard for one in logprobs]
    return sum(values) / len(values)


def _is_own(sample: EncodedSample, said: Mapping[str, Answer]) -> bool:
    count = len(sample.answer_ids)
    return tuple(said[sample.request.id].token_ids[:count]) == sample.answer_ids


def _with_answer(sample: EncodedSample) -> Request:
    """Ask so that the answer can only be the expected tokens (in llguidance's notation of token ids)."""
    grammar = "start: " + " ".join(f"<[{token}]>" for token in sample.answer_ids)
    params = replace(sample.request.params, max_tokens=len(sample.answer_ids), grammar=grammar, stop=(), logprobs=0)
    return replace(sample.request, params=params)
