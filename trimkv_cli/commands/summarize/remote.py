"""Summaries by a running server: one request a document, several side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimkv_cli.commands.summarize.sheet import Sheet, Summed
from trimkv_cli.commands.summarize.texts import LEAST_ROOM, TOO_LONG
from trimkv_cli.commands.warm import Question, Said, Server, put, say_after
from trimkv_cli.errors import ContextOverflow, TrimkvError
from trimkv_cli.loading.options import SamplingOptions
from trimkv_cli.serve.client import Client, NoAnswer

if TYPE_CHECKING:
    from trimkv_cli.commands.summarize.inputs import Inputs

_MOST = 16  # requests at the same time: the server has rows for some, and the others wait there


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """Which server summarizes, and how."""

    server: Server
    instruction: str
    raw: bool
    think: bool | None
    sampling: SamplingOptions
    quiet: bool
    stats: bool

    def question(self, text: str) -> Question:
        """Return the same prompt as without a server."""
        user = f"{text}\n\n{self.instruction}"
        return Question(user=user, system=None, raw=self.raw, think=self.think, special_tokens=False)

    def hear(self, client: Client, text: str) -> Said:
        """Ask for a summary and hear it to its end."""
        return put(self.server, client, self.question(text), self.sampling).answer(lambda _: None)

    def summed(self, said: Said, name: str) -> Summed | TrimkvError:
        """Return what becomes of an answer: one that had no room is none."""
        written = said.usage.get("completion_tokens", 0)
        reduced = any(warning.get("code") == "max_tokens_reduced" for warning in said.extra.get("warnings", ()))
        if reduced and said.finish_reason == "length" and written < LEAST_ROOM:
            return ContextOverflow(f"{name}: the text leaves {written} positions for its summary", hint=TOO_LONG)
        return Summed(
            text=said.text,
            record=lambda: said.to_completion(f"{name}#1"),
            say=lambda: say_after(said, quiet=self.quiet, stats=self.stats),
            tokens=(said.usage.get("prompt_tokens", 0), written),
        )


def write(asking: Asking, inputs: Inputs, sheet: Sheet) -> Mapping[str, Any]:
    """Write the summaries; return what the server said of itself with the last one.

    Raises:
        NoAnswer: the only one cannot be had, and nothing has been written.
    """
    return _write_one(asking, inputs, sheet) if sheet.alone else _write_all(asking, inputs, sheet)


def _write_one(asking: Asking, inputs: Inputs, sheet: Sheet) -> Mapping[str, Any]:
    document = inputs.take(0)
    try:
        warm = put(asking.server, asking.server.client(), asking.question(document.text), asking.sampling)
    except NoAnswer:
        inputs.ready[0] = document
        raise
    except TrimkvError as error:
        sheet.put(0, _hinted(error))
        return {}
    try:
        said = warm.answer(sheet.writer.push if sheet.streams else lambda _: None)
    except TrimkvError as error:
        sheet.put(0, error)
        return {}
    sheet.put(0, asking.summed(said, f"0:{inputs.names[0]}"))
    return said.extra


def _write_all(asking: Asking, inputs: Inputs, sheet: Sheet) -> Mapping[str, Any]:
    waiting: deque[tuple[int, Client, Future[Said]]] = deque()
    extra: Mapping[str, Any] = {}

    def finish() -> None:
        nonlocal extra
        index, _, future = waiting[0]
        try:
            said = future.result()
            extra = said.extra
            sheet.put(index, asking.summed(said, f"{index}:{inputs.names[index]}"))
        except TrimkvError as error:
            sheet.put(index, _hinted(error))
        waiting.popleft()

    pool = ThreadPoolExecutor(_MOST)
    try:
        for index in range(len(inputs.names)):
            while len(waiting) >= _MOST:
                finish()
            try:
                document = inputs.take(index)
            except TrimkvError as error:
                sheet.put(index, error)
                continue
            client = asking.server.client()
            waiting.append((index, client, pool.submit(asking.hear, client, document.text)))
        while waiting:
            finish()
    finally:
        for _, client, _ in waiting:
            client.hang_up()
        pool.shutdown(cancel_futures=True)
    return extra


def _hinted(error: TrimkvError) -> TrimkvError:
    return ContextOverflow(error.message, hint=TOO_LONG) if isinstance(error, ContextOverflow) else error
