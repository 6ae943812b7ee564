"""The same questions under every policy and budget, around one loaded model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from trimkv_cli.cache.gates import build_gates
from trimkv_cli.cache.retention_gate import RetentionGate
from trimkv_cli.engine.devices import pick_device
from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.text import Text
from trimkv_cli.errors import ContextOverflow, UnsupportedModel, UsageError
from trimkv_cli.eval.exam import PPL, EncodedSample, EvalOptions, Exam, make_exams
from trimkv_cli.eval.perplexity import draw_text, interval_of_mean, nats
from trimkv_cli.eval.samples import export_line
from trimkv_cli.eval.scoring import EvalResult, Policy, interval, judge
from trimkv_cli.eval.texts import RealText
from trimkv_cli.events import Answer
from trimkv_cli.loading.assemble import assemble
from trimkv_cli.loading.loader import Parts, load_parts, load_text, plan_for
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.loading.sources import Source
from trimkv_cli.model.pins import Ends, Pins
from trimkv_cli.model.spec import GateSpec, full_gate, keydiff_gate, streaming_gate
from trimkv_cli.plan.plan import Plan
from trimkv_cli.request import Request
from trimkv_cli.streams import Every

Say = Callable[[str], None]

_PREFILL_TOKENS = 256  # rows × chunk of one prefill: small chunks of several rows go together
_ROWS = 32  # several documents, with all that is asked about each
_ROW_SLOTS = 32 * 1024  # of all rows of a full cache
_SAY_EVERY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
    """One policy at one budget, planned."""

    policy: Policy
    plan: Plan


def evaluate(source: Source, engine: EngineOptions, asked: EvalOptions, *, say: Say) -> list[EvalResult]:
    """Return the rows by task, in the order in which policies and budgets were asked for; `say` gets progress.

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
    options, setups = _plan(source, engine, asked, positions)
    _check_pins(setups, exams)
    parts = load_parts(source, options)
    for remark in _remarks(parts, setups):
        say(remark)
    rows: dict[tuple[str, int], EvalResult] = {}
    for number, setup in sorted(enumerate(setups), key=lambda pair: _slots(pair[1])):
        with closing(_engine(parts, setup, asked, options, positions)) as llm:
            rows |= {(exam.task, number): _measure(llm, setup, exam, asked, say) for exam in exams}
            if reading is not None:
                rows[PPL, number] = _read(llm, setup, reading, asked, say)
    tasks = [exam.task for exam in exams] + ([PPL] if reading is not None else [])
    return _with_ratios([rows[task, number] for task in tasks for number in range(len(setups))])


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


def _read(engine: Engine, setup: _Setup, reading: _Reading, asked: EvalOptions, say: Say) -> EvalResult:
    values = nats(engine, reading.request)
    mean = sum(values) / len(values)
    name = PPL if setup.policy == "full" else f"{PPL} {setup.policy} M={setup.plan.run.kv_budget}"
    say(f"{name}: {math.exp(mean):.2f} ({mean:.3f} nats a token)")
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


def _of_setup(setup: _Setup, asked: EvalOptions) -> dict[str, Any]:
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


def _plan(
    source: Source, engine: EngineOptions, asked: EvalOptions, positions: int
) -> tuple[EngineOptions, list[_Setup]]:
    """Plan every policy at every budget, with weights in one form; return the options to load with, and the plans."""
    # Without a limit on all memory, several rows' chunks go through the model together; the plan counts that.
    wide = engine.budget is None and asked.prefill_chunk > 0 and not engine.deterministic
    tokens = max(asked.prefill_chunk, _PREFILL_TOKENS) if wide else asked.prefill_chunk
    most = max(1, min(_ROWS, _ROW_SLOTS // positions))
    rows = most if engine.budget is None and engine.max_inflight is None and not engine.deterministic else None
    options = replace(
        engine, context=None, kv_budget=None, prefill_chunk=tokens, max_inflight=rows or engine.max_inflight
    )
    largest = max(_setups(source, options, asked, positions), key=_slots).plan.run
    options = replace(options, dtype=largest.dtype, quantize=largest.quantize, kv_budget=str(largest.kv_budget))
    return options, _setups(source, options, asked, positions)


def _setups(source: Source, options: EngineOptions, asked: EvalOptions, positions: int) -> list[_Setup]:
    device = pick_device(options.device)
    wanted = [
        (policy, budget)
        for policy in asked.policies
        for budget in ((str(positions),) if policy == "full" else asked.budgets)
    ]
    return [
        _Setup(
            policy=policy,
            plan=plan_for(
                replace(source, gate=gate_spec(policy, source.gate)),
                replace(options, kv_budget=budget, pin=_pin(policy, options.pin)),
                device,
            ),
        )
        for policy, budget in wanted
    ]


def _pin(policy: Policy, asked: str | None) -> str | None:
    """Return what is pinned: as asked for under every policy, and a tenth of the slots at each end if protected."""
    if policy != "protected":
        return asked or "none"  # what a scorer pins by default would set it apart
    pins = Pins.parse(asked)
    return str(replace(pins, prompt=pins.prompt or Ends(10, is_share=True)))


def _check_pins(setups: list[_Setup], exams: list[Exam]) -> None:
    """Refuse pins that leave no slot before a weight is read."""
    longest = max((q.request.prefix_len for exam in exams for q in exam.samples), default=0)
    for setup in setups:
        run = setup.plan.run
        run.pins.check(longest, run.kv_budget, sinks=run.gate.kept)


def _slots(setup: _Setup) -> int:
    return setup.plan.run.kv_budget


def _remarks(parts: Parts, setups: list[_Setup]) -> Iterator[str]:
    """Yield what a user should know once: of the model, of its gates, and of each budget."""
    yield from parts.facts.notes
    run = parts.facts.plan.run
    if run.form != "none":
        yield f"{run.precision} weights of {run.bits_per_weight} bits"
    loading = {warning.message for warning in parts.facts.plan.warnings}  # of a plan that nothing runs under
    own = [warning.message for warning in parts.facts.warnings if warning.message not in loading]
    planned = [warning.message for setup in setups for warning in setup.plan.warnings]
    yield from (f"warning: {message}" for message in dict.fromkeys([*own, *planned]))


def _engine(parts: Parts, setup: _Setup, asked: EvalOptions, options: EngineOptions, positions: int) -> Engine:
    plan = replace(setup.plan, run=replace(setup.plan.run, prefill_chunk=asked.prefill_chunk))
    return assemble(
        parts.model,
        policy_gates(setup.policy, parts, positions=positions, seed=asked.seed),
        replace(parts.facts, plan=plan),
        text=parts.text,
        kv_dtype=parts.kv_dtype,
        deterministic=options.deterministic,
        prefill_tokens=setup.plan.run.prefill_chunk,
    )


def _measure(engine: Engine, setup: _Setup, exam: Exam, asked: EvalOptions, say: Say) -> EvalResult:
    before = engine.stats
    name = _name(setup, exam)
    answers = dict(_ask(engine, exam.samples, lambda done: say(f"{name}: {done} of {len(exam.samples)} answered")))
    right = [judge(answers[q.request.id].text, q.sample, exam.match) for q in exam.samples]
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


def _name(setup: _Setup, exam: Exam) -> str:
    budget = "" if setup.policy == "full" else f" M={setup.plan.run.kv_budget}"
    return f"{exam.task} {setup.policy}{budget}"


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


class RandomGate(RetentionGate):
    """Value each position by chance, each layer and head in its own way: log_beta uniform in (−1, 0).

    Scores age as they do under every gate: the latest tokens stay for sure, of the older ones a random choice.
    """

    def __init__(self, *, num_kv_heads: int, positions: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Buffer(-torch.rand(positions, num_kv_heads, generator=generator))

    def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:  # noqa: ARG002
        return self.table[positions.clamp(min=0).long()]


def gate_spec(policy: Policy, trained: GateSpec) -> GateSpec:
    """Describe a policy's gate as the plan wants it."""
    match policy:
        case "full":
            return full_gate()
        case "gates" | "static":
            return trained
        case "keydiff":
            return keydiff_gate()
        case "streaming" | "protected":
            return streaming_gate()
        case "random":
            return GateSpec(variant="streaming", id="random", sinks=0)  # a constant gate: it has no weights
        case _:
            assert_never(policy)


def policy_gates(policy: Policy, parts: Parts, *, positions: int, seed: int) -> Sequence[nn.Module]:
    """Return one gate per layer, for sequences of at most `positions` tokens."""
    spec, device = parts.facts.spec, parts.model.device
    if policy in ("gates", "static"):
        return parts.gates
    if policy == "random":
        return [
            RandomGate(num_kv_heads=spec.num_kv_heads, positions=positions, seed=seed * spec.num_layers + layer).to(
                device
            )
            for layer in range(spec.num_kv_layers)
        ]
    return list(build_gates(gate_spec(policy, parts.facts.gate), spec, {}, dtype=torch.float32, device=device))


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
