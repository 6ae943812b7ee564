"""One request on its way: its tickets in the engine's thread, and a mailbox for what comes of them."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from trimkv_cli.errors import TrimkvError
from trimkv_cli.events import Answer, TokenEvent
from trimkv_cli.jobs.lines import BadLine, Item
from trimkv_cli.jobs.requests import call_params, check_length, definitions, fitted, make_requests
from trimkv_cli.jobs.tool_calls import answer_message
from trimkv_cli.request import Request
from trimkv_cli.serve.errors import ApiError
from trimkv_cli.serve.histories import Histories, History
from trimkv_cli.serve.worker import Ticket, Worker

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine

_MOST_UNREAD = 8192  # events that a client may leave unread before its request is ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A choice has its row; `continued` when that row held the earlier turns."""

    continued: bool


News = Begun | TokenEvent | ApiError


class Mailbox:
    """Carry news, each with the index of its choice, from the engine's thread to a coroutine; bounded."""

    def __init__(self, most: int = _MOST_UNREAD) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: deque[tuple[int, News]] = deque()
        self._most = most
        self._ready = asyncio.Event()

    def put(self, index: int, news: News) -> bool:
        """Add news, from any thread; False when there is no room for them."""
        if len(self._news) >= self._most:
            return False
        self._news.append((index, news))
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the loop has ended, and with it whoever would read
            return False
        return True

    def close(self, last: News) -> None:
        """Add the last news, whatever lies there."""
        self._most += 1
        self.put(0, last)

    async def get(self) -> tuple[int, News]:
        """Return the oldest news, when there are any."""
        while not self._news:
            self._ready.clear()
            if not self._news:
                await self._ready.wait()
        return self._news.popleft()


class Exchange:
    """Run one item: all its choices, over a worker; close it in any case, which ends what still runs."""

    def __init__(self, worker: Worker, item: Item, text: Any, *, continues: bool) -> None:
        self.item = item
        self.answers: list[Answer] = []
        self.mailbox = Mailbox()
        self._worker = worker
        self._text = text
        self._tickets: list[Ticket] = []
        self._continues = continues and item.choices == 1
        self._how = (item.think, definitions(item))  # beside the messages, what decides their tokens
        self._prompt: tuple[int, ...] = ()

    async def open(self) -> bool:
        """Hand the item to the engine, and return whether it goes on from a kept row, once it has one.

        Raises:
            ApiError: it is refused.
        """
        requests: list[Request] | None = None
        if self.item.messages is None or not self._continues or self._find(self._worker.histories) is None:
            requests = await asyncio.to_thread(self._render)
            self._prompt = requests[0].prompt_token_ids
        count = self.item.choices
        for index in range(count):
            fresh = None if requests is None else requests[index]
            placeholder = fresh or Request(id=f"line-{self.item.line}", prompt_token_ids=(), params=self.item.params)
            self.answers.append(Answer(placeholder))
            ticket = Ticket(
                take=partial(self._put, index),
                fail=self._fail,
                begun=partial(self._begun, index),
                find=self._find if self._continues else _nothing,
                make=partial(self._make, fresh),
                left=self._left if self._continues else None,
            )
            self._tickets.append(ticket)
        for ticket in self._tickets:
            try:
                self._worker.submit(ticket)
            except TrimkvError as error:
                raise ApiError.of(error) from error
        _, news = await self.mailbox.get()
        if isinstance(news, ApiError):
            raise news
        assert isinstance(news, Begun)
        return news.continued

    async def next(self) -> tuple[int, TokenEvent] | None:
        """Return the next event with the index of its choice, None when all have ended.

        Raises:
            ApiError: the request cannot go on.
        """
        while not all(answer.last is not None for answer in self.answers):
            index, news = await self.mailbox.get()
            if isinstance(news, ApiError):
                raise news
            if isinstance(news, TokenEvent):
                if news.fault is not None:
                    raise ApiError.of(news.fault)
                self.answers[index].take(news)
                return index, news
        return None

    def close(self) -> None:
        """End what still runs."""
        for ticket in self._tickets:
            self._worker.cancel(ticket)

    def _begun(self, index: int, continued: bool) -> None:
        self._put(index, Begun(continued=continued))

    def _fail(self, error: Exception) -> None:
        self.mailbox.close(ApiError.of(error, limit_key=self.item.limit_key))

    def _put(self, index: int, news: News) -> None:
        if not self.mailbox.put(index, news):
            self.close()
            self.mailbox.close(ApiError(503, "the answer is not read: too much of it waits", code="slow_client"))

    def _render(self) -> list[Request]:
        try:
            if self._text is not None:
                check_length(self.item, self._text, self._worker.gauge.positions)
        except TrimkvError as error:
            raise ApiError.of(error) from error
        requests = make_requests(self.item, self._text)
        if isinstance(requests, BadLine):
            raise ApiError.of_line(requests)
        return [replace(request, keep=self._continues) for request in requests]

    def _find(self, histories: Histories) -> History | None:
        if self.item.messages is not None:
            return histories.find(self.item.messages, self._how)
        return histories.find_tokens(self._prompt)

    def _make(self, fresh: Request | None, engine: Engine, history: History | None) -> Request | None:
        """Return the request that goes on from a history, or without one the one that reads all."""
        if history is None:
            request = fresh or self._render()[0]
        else:
            ids = self._rest(engine, history)
            if not ids:
                return None
            params, shown = (self.item.params, ()) if engine.text is None else call_params(self.item, engine.text)
            request = Request(
                id=f"line-{self.item.line}",
                prompt_token_ids=ids,
                params=params,
                shown=shown,
                keep=True,
                continues=history.id,
            )
        (request,), self.item = fitted([request], self.item, engine.room(request))
        return request

    def _rest(self, engine: Engine, history: History) -> tuple[int, ...]:
        """Render what follows a history's answer; nothing where the template cannot."""
        if self.item.messages is None:
            return self._prompt[len(history.fed) :]
        assert engine.text is not None
        try:
            rest = engine.text.render_rest(
                self.item.messages,
                len(history.messages),
                last_token_id=history.last_token,
                eos_token_ids=engine.facts.eos_token_ids,
                tools=definitions(self.item),
                think=self.item.think,
            )
        except TrimkvError:
            return ()
        return tuple(rest)

    def _left(self, engine: Engine, request: Request, last_token: int | None, text: str) -> History:
        template = "" if engine.text is None else engine.text.template.text
        return History(
            id=request.id,
            fed=engine.kept.token_ids(request.id),
            messages=self.item.messages or (),
            how=self._how,
            answer=None if self.item.messages is None else answer_message(self.item, template, text),
            last_token=last_token,
        )


def _nothing(_: Histories) -> None:
    return None
