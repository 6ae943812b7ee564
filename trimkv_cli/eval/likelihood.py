"""How likely the expected answers are under a policy, token by token, whatever the model says itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.request import Request
from trimkv_cli.eval.exam import Question


@dataclass(slots=True, kw_only=True)
class Said:
    """What a model said to one question: text, token ids and the log probability of each."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


def mean_logprob(engine: Engine, questions: Sequence[Question], said: Mapping[str, Said]) -> float:
    """Return the mean log probability of a token of the expected answers, in nats.

    Where the model said the expected tokens by itself, they need no second reading; the other questions are read again
    with the answer put into the model's mouth.

    Raises:
        UsageError: the tokenizer cannot be held to a text.
    """
    own = {q.request.id: said[q.request.id].logprobs[: len(q.answer_ids)] for q in questions if _is_own(q, said)}
    forced = dict.fromkeys((q.request.id for q in questions if q.request.id not in own), ())
    heard: dict[str, tuple[float, ...]] = {**own, **forced}
    requests = [_with_answer(question) for question in questions if question.request.id in forced]
    for event in engine.generate(requests):
        if event.fault is not None:
            raise event.fault
        heard[event.request_id] += tuple(one.logprob for one in event.logprobs)
    values = [value for logprobs in heard.values() for value in logprobs]
    return sum(values) / len(values)


def _is_own(question: Question, said: Mapping[str, Said]) -> bool:
    count = len(question.answer_ids)
    return said[question.request.id].token_ids[:count] == question.answer_ids


def _with_answer(question: Question) -> Request:
    """Ask so that the answer can only be the expected tokens (in llguidance's notation of token ids)."""
    grammar = "start: " + " ".join(f"<[{token}]>" for token in question.answer_ids)
    params = replace(question.request.params, max_tokens=len(question.answer_ids), grammar=grammar, stop=(), logprobs=0)
    return replace(question.request, params=params)
