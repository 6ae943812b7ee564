"""`trimkv chat`: a conversation in the terminal, of which only new tokens are ever run."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from trimkv_cli.commands.options import Quiet, System, SystemFile, Think, with_options
from trimkv_cli.engine.options import EngineOptions, SamplingOptions
from trimkv_cli.errors import ContextOverflow, UsageError
from trimkv_cli.ui.messages import print_error, print_note

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
    from trimkv_cli.commands.answers import announce
    from trimkv_cli.commands.prompts import read_system
    from trimkv_cli.engine.loader import load_engine

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError("chat needs a terminal", hint='in a pipeline: echo "hello" | trimkv ask')
    llm = load_engine(replace(engine, model=name or engine.model, max_inflight=1))
    announce(llm, quiet=quiet)
    _talk(_Conversation(llm, read_system(system, system_file), think, sampling), quiet=quiet)


class _Conversation:
    """Own the turns: what has been said lives in the cache, only the newest turn is rendered."""

    def __init__(self, llm: Engine, system: str | None, think: bool | None, sampling: SamplingOptions) -> None:
        self.llm = llm
        self.last_id: str | None = None
        self._last_token: int | None = None
        self._system = system
        self._think = think
        self._params = sampling.resolve(llm.facts.sampling_defaults)

    def say(self, user: str) -> None:
        """Run one turn and print its answer as it comes; Ctrl-C keeps what there is of it."""
        from trimkv_cli.engine.request import Request
        from trimkv_cli.ui.plain import AnswerWriter

        ids, prefix_len = self._render(user)
        request = Request(
            id=f"turn-{1 if self.last_id is None else int(self.last_id.removeprefix('turn-')) + 1}",
            prompt_token_ids=ids,
            prefix_len=prefix_len,
            params=replace(self._params, seed=self._params.seed),
            keep=True,
            continues=self.last_id,
            context=self.llm.facts.max_positions,
        )
        self.llm.check(request)
        self.last_id, self._last_token = request.id, None
        writer = AnswerWriter()
        try:
            for event in self.llm.generate([request]):
                self._last_token = event.token_ids[-1]
                writer.push(event.text)
                if event.finish_reason == "length":
                    print_note(f"stopped after {self._params.max_tokens} tokens; --max-tokens N allows more")
        except KeyboardInterrupt:
            stopped = self.llm.stop(request.id)
            writer.push(stopped.text if stopped is not None else "")
        writer.close()

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
