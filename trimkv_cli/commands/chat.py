"""`trimkv chat`: a conversation in the terminal, of which only new tokens are ever run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from trimkv_cli.commands.options import Quiet, System, SystemFile, Think, with_options
from trimkv_cli.engine.options import EngineOptions, SamplingOptions
from trimkv_cli.errors import ContextOverflow, UsageError
from trimkv_cli.events import TokenEvent
from trimkv_cli.ui.messages import print_error, print_note
from trimkv_cli.ui.plain import AnswerWriter

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine


@with_options(engine=EngineOptions, sampling=SamplingOptions)
def chat(
    name: Annotated[str | None, typer.Argument(help="Profile name, hub id or folder.", metavar="[MODEL]")] = None,
    *,
    system: System = None,
    system_file: SystemFile = None,
    think: Think = None,
    quiet: Quiet = False,
    engine: EngineOptions,
    sampling: SamplingOptions,
) -> None:
    """Talk with a model; the cache stays as large as it is, however long the talk.

    Enter sends, Ctrl-C stops an answer, Ctrl-D or /exit ends.
    """
    from trimkv_cli.commands.answers import open_engine
    from trimkv_cli.commands.prompts import draw_seed, read_system

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("chat needs a terminal", hint='in a pipeline: echo "hello" | trimkv ask')
    llm = open_engine(replace(engine, model=name or engine.model, max_inflight=1), quiet=quiet)
    _talk(_Conversation(llm, read_system(system, system_file), think, draw_seed(sampling)), quiet=quiet)


class _Conversation:
    """Own the turns: what has been said lives in the cache, only the newest turn is rendered."""

    def __init__(self, llm: Engine, system: str | None, think: bool | None, sampling: SamplingOptions) -> None:
        self.llm = llm
        self.last_id: str | None = None
        self._last_token: int | None = None
        self._turns = 0
        self._cut = False
        self._system = system
        self._think = think
        self._params = sampling.resolve(llm.facts.sampling_defaults)

    def say(self, user: str) -> None:
        """Run one turn and print its answer as it comes; Ctrl-C keeps what there is of it."""
        from trimkv_cli.engine.request import Request

        ids, prefix_len = self._render(user)
        self._turns += 1
        request = Request(
            id=f"turn-{self._turns}",
            prompt_token_ids=ids,
            prefix_len=prefix_len,
            params=replace(self._params, seed=(self._params.seed + self._turns) % 2**63),
            keep=True,
            continues=self.last_id,
            context=self.llm.facts.max_positions,
        )
        self.llm.check(request)
        self.last_id, self._last_token = request.id, None
        writer = AnswerWriter()
        self.llm.add(request)
        with _ctrl_c_noted() as pressed:
            while self.llm.has_work:
                stopped = self.llm.stop(request.id) if pressed() else None
                for event in [stopped] if stopped is not None else self.llm.step():
                    self._take(event, writer)
        writer.close()
        if self._cut:
            print_note(f"stopped after {self._params.max_tokens} tokens; --max-tokens N allows more")

    def _take(self, event: TokenEvent, writer: AnswerWriter) -> None:
        writer.push(event.text)
        if event.token_ids:
            self._last_token = event.token_ids[-1]
        self._cut = event.finish_reason == "length"

    def _render(self, user: str) -> tuple[tuple[int, ...], int]:
        from trimkv_cli.commands.prompts import need_text, render

        if self.last_id is None:
            first = render(self.llm.text, user, system=self._system, raw=False, think=self._think)
            return first.token_ids, first.prefix_len
        ids = need_text(self.llm.text).render_turn(
            user, last_token_id=self._last_token, eos_token_ids=self.llm.facts.eos_token_ids, think=self._think
        )
        return tuple(ids), 0

    def status(self) -> str:
        """Say how much of the conversation the cache still holds."""
        if self.last_id is None:
            return "nothing said yet"
        seen = self.llm.seen(self.last_id)
        return f"{min(seen, self.llm.facts.plan.kv_budget)} of {seen} tokens kept per head"


@contextmanager
def _ctrl_c_noted() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C be asked for between steps: inside one it would leave some layers a token ahead of others."""
    presses: list[int] = []

    def note(number: int, _: object) -> None:
        if presses:
            raise KeyboardInterrupt  # the second one does not wait
        presses.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, before)


def _talk(conversation: _Conversation, *, quiet: bool) -> None:
    if not quiet:
        print_note("Enter sends, Ctrl-C stops an answer, Ctrl-D or /exit ends.")
    interrupted = False
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if interrupted:
                raise
            print()
            print_note("Ctrl-C once more, Ctrl-D or /exit ends.")
            interrupted = True
            continue
        interrupted = False
        if line.strip() == "/exit":
            return
        if line.startswith("/"):
            print_error(f"unknown command {line.split()[0]}", "/exit ends; a message cannot begin with /")
        elif line.strip():
            _turn(conversation, line, quiet=quiet)


def _turn(conversation: _Conversation, line: str, *, quiet: bool) -> None:
    try:
        conversation.say(line)
    except ContextOverflow as error:
        print_error(error.message, "start a new conversation: /exit and trimkv chat")
        return
    if not quiet:
        print_note(conversation.status())
