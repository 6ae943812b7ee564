"""`trimkv eval`: accuracy at several budgets, beside a full cache, streaming and random eviction."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trimkv_cli.commands.options import JSON, QUIET, ModelName
from trimkv_cli.errors import ContextOverflow, UsageError
from trimkv_cli.eval.samples import Match
from trimkv_cli.eval.scoring import EVERY_POLICY, POLICIES, Policy
from trimkv_cli.files import check_folder, whole_file
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.settings import option
from trimkv_cli.ui.plain import print_answer, print_note
from trimkv_cli.units import parse_kv_budget, read_flag

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trimkv_cli.commands.summarize.pool import Chain
    from trimkv_cli.engine.engine import Engine
    from trimkv_cli.eval.exam import EncodedSample, EvalOptions
    from trimkv_cli.eval.scoring import EvalResult
    from trimkv_cli.events import Answer
    from trimkv_cli.loading.sources import Source

_BUDGETS, _MINI_BUDGETS = "128,256", "32,64,128"
_MINI_TASKS = "recall,kv-retrieval,mini-multi-turn,procedure"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamOptions:
    """What is asked, at which budgets, and how answers are judged; as typed."""

    tasks: str | None = option(
        None,
        "Of needle, multi-turn, instructions, summary-recall, ppl; in mini's own language recall, kv-retrieval,"
        " mini-multi-turn, procedure. Default: needle (mini: its own), or none with --data.",
        "LIST",
    )
    text: list[str] | None = option(
        None, "Real text to hide facts in, UTF-8; may be given several times. Default: a short sample.", "FILE"
    )
    data: str | None = option(
        None,
        'Your own questions: lines {"messages": [...], "answer": "..."}, or "prompt" for a text to continue.',
        "FILE.jsonl",
    )
    budgets: str | None = option(
        None, f"Slots per KV head, as --kv-budget; default {_BUDGETS} (mini: {_MINI_BUDGETS}).", "LIST"
    )
    policies: str = option(
        ",".join(POLICIES),
        "What to compare, in this order; also static (gates of others, given by --gates) and map-reduce.",
        "LIST",
    )
    samples: int | None = option(None, "Questions per task; default 100, and all lines of --data.", "N")
    match: Match | None = option(
        None,
        "exact: the answer and nothing else; contains: in any wording. Default: contains for real text, else exact.",
    )
    logprob: bool = option(False, "Find the log probability of the expected answers too, which reads most twice.")
    max_tokens: int | None = option(
        None, "Most tokens of an answer; default: as the expected one.", "N", short="-n", setting=True
    )
    seed: int = option(0, "Same seed, same questions.", "N", setting=True)
    export: str | None = option(
        None, "Write the questions for another program to answer (see the example), and ask nothing.", "FILE.jsonl"
    )
    answers: str | None = option(
        None,
        'Score what another program said to --data, exported before: lines {"id": "...", "output": "..."}, with '
        '"policy" and "kv_budget" too where there are several.',
        "FILE.jsonl",
    )
    plot: str | None = option(None, "Draw accuracy against budget (needs trimkv-cli[plot]).", "FILE.png|svg")


def evaluate(
    name: ModelName = None, *, exam: ExamOptions, json: bool = JSON, quiet: bool = QUIET, engine: EngineOptions
) -> None:
    """Measure accuracy at several budgets, beside a full cache, streaming and random eviction of the same size.

    trimkv eval smollm2-135m-instruct --tasks needle --context 700 --budgets 128,256 --samples 200 --text book.txt

    trimkv eval mini --tasks recall --context 1000 --budgets 32,64,128 --samples 100 --seed 7

    trimkv eval qwen3-4b-instruct-2507 --data questions.jsonl --match contains --kv-budget 512,1024 --json

    trimkv eval smollm2-135m-instruct --tasks needle,multi-turn --samples 200 --export questions.jsonl

    trimkv eval --data questions.jsonl --answers snapkv.jsonl

    On real text, needle hides facts between its sentences and asks for each in other words, multi-turn does so over a
    chat, instructions asks for what a rule of the system message says behind a long text, summary-recall counts the
    facts that a summary says, and ppl is the perplexity of --context tokens. Answers are greedy, and every question is
    a prompt of its own. protected is streaming with --pin prompt:10%; map-reduce does summary-recall as summarize
    --on-overflow map-reduce would, in parts that fit a full cache of M slots. Intervals draw documents again where
    several questions share one. --context is the length of what is made. --prefill-chunk is 32 here unless it is given:
    a chunk longer than M sees more than M.

    The last two examples compare with another program: it answers each line of what --export wrote ("messages" or
    "prompt") with a line of its own, such as {"id": "needle-0", "output": "In Uppsala."}, and --answers scores those as
    ours are, a row for each task of the file.
    """
    from trimkv_cli.loading.sources import find_source

    if exam.plot is not None:
        _check_plot(exam.plot)
    if exam.export is not None:
        check_folder(exam.export, "--export")
    if exam.answers is not None:
        _show(_score(exam), exam, json=json)
        return
    if exam.budgets is not None and engine.kv_budget is not None:
        raise UsageError("--budgets and --kv-budget are both given", hint="they are the same: give one")
    asked = _eval_options(exam, engine, mini=_is_mini(name, engine))
    gates = engine.gates if {"gates", "static"} & {*asked.policies} else "none"
    options = replace(engine, model=name or engine.model, gates=gates)
    source = find_source(options, weights=True)
    if source.warnings and exam.policies == ",".join(POLICIES):  # nobody asked for gates, and there are none
        asked = replace(asked, policies=tuple(policy for policy in asked.policies if policy != "gates"))
    if source.gate.by_others and exam.policies == ",".join(POLICIES):
        own: tuple[Policy, ...] = tuple("static" if policy == "gates" else policy for policy in asked.policies)
        asked = replace(asked, policies=own)
    if exam.export is not None:
        _write(source, options, asked, exam.export, quiet=quiet)
        return
    _show(_evaluate(source, options, asked, quiet=quiet), exam, json=json)


def _score(exam: ExamOptions) -> list[EvalResult]:
    """Score another program's answers; no model is needed."""
    from trimkv_cli.eval.others import score_answers

    if exam.data is None or exam.answers is None or exam.export is not None:
        raise UsageError("--answers needs the questions", hint="--data EXPORTED.jsonl --answers FILE.jsonl")
    return score_answers(exam.data, exam.answers, exam.match)


def _write(source: Source, options: EngineOptions, asked: EvalOptions, path: str, *, quiet: bool) -> None:
    from trimkv_cli.eval.run import export

    lines = export(source, options, asked)
    with whole_file(Path(path), hint="check the path given to --export") as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if not quiet:
        print_note(f"{len(lines)} questions in {path}")


def _is_mini(name: str | None, engine: EngineOptions) -> bool:
    from trimkv_cli.loading.sources import model_ref
    from trimkv_cli.model.profiles import MINI

    return model_ref(name or engine.profile or engine.model, engine.revision).id == MINI


def _eval_options(exam: ExamOptions, engine: EngineOptions, *, mini: bool) -> EvalOptions:
    from trimkv_cli.eval.exam import EvalOptions

    budgets = _split(exam.budgets or engine.kv_budget or (_MINI_BUDGETS if mini else _BUDGETS))
    for budget in budgets:
        read_flag("--budgets", budget, parse_kv_budget)
    return EvalOptions(
        tasks=_tasks(exam, mini=mini),
        text=tuple(exam.text or ()),
        data=exam.data,
        context=1000 if engine.context is None else engine.context,
        samples=exam.samples,
        seed=exam.seed,
        budgets=budgets,
        policies=tuple(_policy(word) for word in _split(exam.policies)),
        prefill_chunk=32 if engine.prefill_chunk is None else engine.prefill_chunk,
        match=exam.match,
        max_tokens=exam.max_tokens,
        logprob=exam.logprob,
    )


def _tasks(exam: ExamOptions, *, mini: bool) -> tuple[str, ...]:
    """Return the tasks by their full names: the built-in mini's chats are in its own language."""
    if exam.tasks is None:
        return () if exam.data is not None else _split(_MINI_TASKS if mini else "needle")
    own = {"multi-turn": "mini-multi-turn"} if mini else {}
    return tuple(own.get(task, task) for task in _split(exam.tasks))


def _evaluate(source: Source, options: EngineOptions, asked: EvalOptions, *, quiet: bool) -> list[EvalResult]:
    from trimkv_cli.eval.run import evaluate

    return evaluate(source, options, asked, say=(lambda _: None) if quiet else print_note, summarize=summarize_in_parts)


def summarize_in_parts(llm: Engine, samples: Sequence[EncodedSample]) -> Iterator[tuple[str, Answer]]:
    """Yield summaries as `trimkv summarize --on-overflow map-reduce` makes them, of texts that it can summarize."""
    from trimkv_cli.commands.summarize.pool import DocumentSummary, Pool, Task, summarize_text

    def chain(asked: EncodedSample) -> Chain:
        task = Task(
            instruction=asked.sample.question,
            raw=asked.sample.prompt is not None,
            params=asked.request.params,
            max_tokens_said=True,
            think=False,
            map_reduce=True,
        )
        return summarize_text(llm, asked.request.id, asked.sample.text_to_summarize, task)

    pool = Pool(llm, on_text=lambda _, __: None, on_answer=lambda _, __: None)
    for index, outcome in pool.run(map(chain, samples), lambda: None):
        if isinstance(outcome, DocumentSummary):
            yield samples[index].request.id, outcome.answer
        elif not isinstance(outcome, ContextOverflow):
            raise outcome


def _show(rows: list[EvalResult], exam: ExamOptions, *, json: bool) -> None:
    if exam.plot is not None:
        from trimkv_cli.ui.accuracy import draw_accuracy

        draw_accuracy(rows, exam.plot)
    if json:
        print(json_module.dumps({"rows": [asdict(row) for row in rows]}))
        return
    from trimkv_cli.ui.accuracy import accuracy_report

    print_answer(accuracy_report(rows))


def _check_plot(path: str) -> None:
    """Refuse what could not be drawn before hours are spent on it."""
    from importlib.util import find_spec

    if Path(path).suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {path} is neither PNG nor SVG", hint="--plot accuracy.svg")
    check_folder(path, "--plot")
    if find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib", hint="pip install 'trimkv-cli[plot]'")


def _split(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _policy(word: str) -> Policy:
    for policy in EVERY_POLICY:
        if word == policy:
            return policy
    raise UsageError(f"there is no policy {word!r}", hint=f"--policies {','.join(EVERY_POLICY)}")
