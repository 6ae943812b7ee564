"""One request from its tokens to the answer: streamed as text, or as one OpenAI chat.completion object."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimkv_cli.commands.memory import budget_report, memory_line, memory_report
from trimkv_cli.errors import UsageError
from trimkv_cli.events import Answer, Notice
from trimkv_cli.loading.options import NOTHING_BESIDE, Beside, EngineOptions
from trimkv_cli.request import Request, SamplingParams
from trimkv_cli.ui.cost import print_cost
from trimkv_cli.ui.plain import print_note, print_warning, to_json

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine
    from trimkv_cli.engine.row_files import RowState
    from trimkv_cli.engine.text import Text


def answer(engine: Engine, request: Request, on_text: Callable[[str], None] = lambda _: None) -> Answer:
    """Run one request to its end; `on_text` gets each piece of text as it comes."""
    finished = Answer(request)
    for event in engine.generate([request]):
        finished.take(event)
        if event.text:
            on_text(event.text)
        if event.fault is not None:
            raise event.fault
    return finished


def within_room(engine: Engine, request: Request, *, said: bool, quiet: bool) -> Request:
    """Let an answer whose length nobody gave be as long as there are positions left; it is said when they are few."""
    fitted = request if said else request.fitted(engine.room(request))
    if fitted is not request and not quiet:
        left = fitted.params.max_tokens
        print_note(f"{left} positions are left for the answer, of {engine.facts.max_positions}")
    return fitted


def open_engine(
    options: EngineOptions,
    *,
    quiet: bool,
    beside: Beside = NOTHING_BESIDE,
    check: Callable[[Text | None], object] | None = None,
) -> Engine:
    """Load the engine and say on stderr what the user should know before the answer.

    The model is found before torch is imported, so that a wrong name is said at once; `check` looks at its tokenizer,
    and may raise, before weights are read.
    """
    if options.on_overflow == "map-reduce":
        raise UsageError("--on-overflow map-reduce is for trimkv summarize", hint="--on-overflow rebase")
    from trimkv_cli.loading.sources import find_source

    source = find_source(options, weights=True)

    from trimkv_cli.loading.loader import load_source

    engine = load_source(source, options, beside=beside, check=check)
    for note in engine.facts.notes if not quiet else ():
        print_note(note)
    for warning in engine.facts.warnings:
        print_warning(warning.message)
    return engine


def say_warnings(finished: Answer) -> None:
    """Say on stderr what happened on the way to an answer that a reader should know."""
    for warning in finished.stats.warnings:
        print_warning(warning.message)


def print_stats(engine: Engine, finished: Answer, *, tokens: tuple[int, int] | None = None) -> None:
    """Print what the request cost to stderr; `tokens` read and written, where it was the last of several."""
    own = (finished.stats.prompt_tokens, finished.stats.completion_tokens)
    read, written = tokens or own
    last = " in the last pass" if read != own[0] else ""
    cache, timing = asdict(finished.stats.cache), _timing(engine, finished)
    print_cost(read=read, written=written, cache=cache, timing=timing, last=last)
    print_note(memory_line(engine))


def to_completion(
    engine: Engine, finished: Answer, options: EngineOptions, warnings: Sequence[Notice] = ()
) -> dict[str, Any]:
    """Return an OpenAI chat.completion object with the extra key `trimkv`; `warnings` are those about the prompt."""
    stats = finished.stats
    message = {"role": "assistant", "content": finished.text, "refusal": None}
    return {
        "id": f"chatcmpl-{finished.request.id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": engine.facts.model_id,
        "choices": [{"index": 0, "message": message, "finish_reason": finished.finish_reason, "logprobs": None}],
        "usage": {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.completion_tokens,
            "total_tokens": stats.prompt_tokens + stats.completion_tokens,
            **stats.details(),
        },
        "trimkv": _report(engine, finished, options, warnings),
    }


def _report(engine: Engine, finished: Answer, options: EngineOptions, warnings: Sequence[Notice]) -> dict[str, Any]:
    facts = engine.facts
    p50, p95 = engine.kept.horizon(finished.request.id)
    return {
        "model": facts.model_id,
        "gates": {"id": facts.gate.id, "trained_memory_size": facts.gate.memory_size},
        "budget": budget_report(engine, options.budget),
        "memory": memory_report(engine),
        "cache": {**asdict(finished.stats.cache), "horizon_p50": p50, "horizon_p95": p95},
        "timing": _timing(engine, finished),
        "sampling": asdict(finished.request.params),
        "warnings": [asdict(each) for each in (*facts.warnings, *warnings, *finished.stats.warnings)],
    }


def _timing(engine: Engine, finished: Answer) -> dict[str, float | None]:
    run, stats = engine.stats, finished.stats
    return {
        "load_s": engine.facts.load_s,
        "ttft_s": stats.ttft_s,
        "prefill_tps": run.prefill_tokens / run.prefill_s if run.prefill_s else 0.0,
        "decode_tps": run.decode_tokens / run.decode_s if run.decode_s else 0.0,
        "total_s": stats.total_s,
    }


class ChunkWriter:
    """Write one object a line through `write`: a piece of text each, then the end of the answer."""

    def __init__(self, write: Callable[[str], None], *, request_id: str, model: str) -> None:
        self._write = write
        self._head = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._first = True

    def push(self, piece: str) -> None:
        delta = {"role": "assistant", "content": piece} if self._first else {"content": piece}
        self._first = False
        self._line({"choices": [_choice(delta, None)]})

    def end(self, completion: dict[str, Any]) -> None:
        """Write what a chat.completion holds beside its text."""
        reason = completion["choices"][0]["finish_reason"]
        self._line({"choices": [_choice({}, reason)], "usage": completion["usage"], "trimkv": completion["trimkv"]})

    def _line(self, more: dict[str, Any]) -> None:
        self._write(to_json({**self._head, **more}))


def _choice(delta: dict[str, str], reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}


def save_read(llm: Engine, request_id: str, path: str) -> None:
    """Write what a finished request left in the cache; raises as `write_row` does."""
    from trimkv_cli.engine.row_files import write_row

    write_row(Path(path), llm.kept.save(request_id), model_id=llm.facts.model_id, fingerprint=llm.fingerprint)


def restore_read(llm: Engine, path: str) -> RowState:
    """Put a saved read back into the cache, where its path names it; raises as `read_row` does."""
    from trimkv_cli.engine.row_files import read_row

    state = read_row(Path(path), model_id=llm.facts.model_id, fingerprint=llm.fingerprint)
    llm.kept.restore(state, path)
    return state


def next_turn(llm: Engine, path: str, user: str, *, params: SamplingParams, think: bool | None) -> Request:
    """Put a saved read back into the cache and return the request that asks about it; raises as `read_row` does."""
    from trimkv_cli.commands.prompts import need_text

    state = restore_read(llm, path)
    ids = need_text(llm.text).render_turn(
        user, last_token_id=state.last_token, eos_token_ids=llm.facts.eos_token_ids, think=think
    )
    return Request(id="ask", prompt_token_ids=tuple(ids), params=params, keep=True, continues=path)
