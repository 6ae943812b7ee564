"""Summaries of many documents over the rows of one engine, each a chain of requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trimkv_cli.commands.summarize.texts import LEAST_ROOM, TOO_LONG, cut
from trimkv_cli.errors import ContextOverflow, TrimkvError
from trimkv_cli.events import Answer, TokenEvent
from trimkv_cli.request import Request, SamplingParams

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class Stage:
    """Requests that may run side by side; the answer of the last stage, which has one, is the document's summary."""

    requests: tuple[Request, ...]
    last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentSummary:
    """A document's summary, and what it took to get there; `parts` is 1 for one pass."""

    answer: Answer
    parts: int
    rounds: int
    prompt_tokens: int
    completion_tokens: int


Outcome = DocumentSummary | TrimkvError
Chain = Generator[Stage, list[Answer], DocumentSummary]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """How every document is summarized; `max_tokens_said` when the user gave the length of an answer."""

    instruction: str
    raw: bool = False  # without the chat template
    params: SamplingParams
    max_tokens_said: bool
    think: bool | None
    map_reduce: bool


def summarize_text(llm: Engine, name: str, text: str, task: Task) -> Chain:
    """Summarize in one pass where the positions allow, else, when asked, part by part and then the summaries.

    Raises:
        ContextOverflow: too long for one pass, and not to be cut; or cutting does not shorten it.
    """
    parts = rounds = prompt_tokens = completion_tokens = 0
    while True:
        rounds += 1
        requests = _requests(llm, f"{name}#{rounds}", text, task)
        answers = yield Stage(requests, last=len(requests) == 1)
        parts = max(parts, len(requests))
        prompt_tokens += sum(answer.stats.prompt_tokens for answer in answers)
        completion_tokens += sum(answer.stats.completion_tokens for answer in answers)
        if len(requests) == 1:
            return DocumentSummary(
                answer=answers[0],
                parts=parts,
                rounds=rounds,
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
            )
        shorter = "\n\n".join(answer.text.strip() for answer in answers)
        if len(shorter) >= len(text):
            raise ContextOverflow(
                f"{name}: the summaries of its {len(answers)} parts are no shorter than the text",
                hint="--max-tokens with fewer tokens, or a model with more positions",
            )
        text = shorter


def _requests(llm: Engine, label: str, text: str, task: Task) -> tuple[Request, ...]:
    """Return one request for the whole text, or several for its parts."""
    try:
        return (_request(llm, label, text, task),)
    except ContextOverflow as error:
        if not task.map_reduce:
            raise ContextOverflow(error.message, hint=TOO_LONG) from error
    assert llm.text is not None, "a prompt was rendered"
    frame = len(_render(llm, "", task))
    room = llm.facts.max_positions - frame - task.params.max_tokens + 1
    if room < LEAST_ROOM:
        raise ContextOverflow(
            f"{llm.facts.max_positions} positions leave no room for a part of the text and a summary of it",
            hint="--max-tokens with fewer tokens, or a larger --context",
        )
    parts = cut(text, room - room // 16, lambda piece: len(llm.text.encode(piece)) if llm.text else 0)
    return tuple(_request(llm, f"{label}.{index}", part, task) for index, part in enumerate(parts, 1))


def _request(llm: Engine, label: str, text: str, task: Task) -> Request:
    request = Request(id=label, prompt_token_ids=_render(llm, text, task), params=task.params, keep=True)
    if not task.max_tokens_said:
        request = request.fitted(llm.room(request), least=LEAST_ROOM)
    llm.check(request)
    return request


def _render(llm: Engine, text: str, task: Task) -> tuple[int, ...]:
    from trimkv_cli.commands.prompts import render

    user = f"{text}\n\n{task.instruction}"
    return render(llm.text, user, system=None, raw=task.raw, think=task.think).token_ids


@dataclass(slots=True, kw_only=True)
class _Running:
    """A document whose stage is under way."""

    index: int
    chain: Chain
    last: bool = False
    answers: dict[str, Answer] = field(default_factory=dict)  # by request id


class Pool:
    """Run chains side by side; few documents are opened ahead of the rows, and each request's row is freed at its end.

    `on_text(index, piece)` gets what the last request of document `index` writes; `on_answer(index, answer)` is called
    while that answer's row is still there.
    """

    def __init__(
        self, llm: Engine, *, on_text: Callable[[int, str], None], on_answer: Callable[[int, Answer], None]
    ) -> None:
        self._llm = llm
        self._on_text = on_text
        self._on_answer = on_answer
        self._queue: deque[tuple[_Running, Request]] = deque()
        self._asked: dict[str, _Running] = {}  # by request id
        self._documents = 0

    @property
    def num_open(self) -> int:
        """Count the documents that are being worked on."""
        return self._documents

    def run(self, chains: Iterable[Chain], after_step: Callable[[], None]) -> Iterator[tuple[int, Outcome]]:
        """Yield every document's summary or fault, by its number, as soon as it is there."""
        coming = enumerate(chains)
        while True:
            while self._documents < self._llm.max_rows and (pair := next(coming, None)) is not None:
                self._documents += 1
                yield from self._advance(_Running(index=pair[0], chain=pair[1]), None)
            if not self._queue and not self._asked:
                return
            while self._queue and self._llm.num_waiting < self._llm.max_rows:
                running, request = self._queue.popleft()
                self._asked[request.id] = running
                self._llm.add(request)
            for event in self._llm.step():
                yield from self._take(event)
            after_step()

    def _advance(self, running: _Running, answers: list[Answer] | None) -> Iterator[tuple[int, Outcome]]:
        """Go on with a chain until it asks for something or ends."""
        try:
            stage = next(running.chain) if answers is None else running.chain.send(answers)
        except StopIteration as end:
            self._documents -= 1
            yield running.index, end.value
            return
        except TrimkvError as error:
            self._documents -= 1
            yield running.index, error
            return
        running.last = stage.last
        running.answers = {request.id: Answer(request) for request in stage.requests}
        self._queue.extend((running, request) for request in stage.requests)

    def _take(self, event: TokenEvent) -> Iterator[tuple[int, Outcome]]:
        running = self._asked[event.request_id]
        answer = running.answers[event.request_id]
        answer.take(event)
        if event.text and running.last:
            self._on_text(running.index, event.text)
        if event.finish_reason is None:
            return
        del self._asked[event.request_id]
        if event.fault is not None:
            self._llm.kept.release(event.request_id)
            yield from self._give_up(running, event.fault)
            return
        if running.last:
            self._on_answer(running.index, answer)
        self._llm.kept.release(event.request_id)
        if all(each.last is not None for each in running.answers.values()):
            yield from self._advance(running, list(running.answers.values()))

    def _give_up(self, running: _Running, error: TrimkvError) -> Iterator[tuple[int, Outcome]]:
        """End a document one of whose requests failed; its others are dropped."""
        for request_id in [key for key, asker in self._asked.items() if asker is running]:
            del self._asked[request_id]
            self._llm.abort(request_id)
        self._queue = deque(queued for queued in self._queue if queued[0] is not running)
        self._documents -= 1
        running.chain.close()
        yield running.index, error
