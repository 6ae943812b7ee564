"""The loop of a conversation: ask for a line, run a command or a turn, show the answer, save."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from trimkv_cli.commands.slash.command import Chat
from trimkv_cli.commands.slash.table import is_command, run_command
from trimkv_cli.errors import ClosedPipe, TrimkvError
from trimkv_cli.ui.chat.answer import AnswerView, ThoughtStyle
from trimkv_cli.ui.chat.screen import Screen, keys_held_back
from trimkv_cli.ui.chat.toolbar import Status, status_line

if TYPE_CHECKING:
    from trimkv_cli.chat.conversation import Conversation, Steps
    from trimkv_cli.ui.chat.prompt import ChatPrompt, Typed


def talk(chat: Chat, prompt: ChatPrompt, screen: Screen) -> None:
    """Go on until /exit or Ctrl-D; Ctrl-C twice in an empty line raises KeyboardInterrupt."""
    interrupted = False
    while not chat.ended:
        draft, chat.draft = chat.draft, ""
        try:
            typed = prompt.ask(draft, _toolbar(chat, screen))
        except EOFError:
            return
        except KeyboardInterrupt:
            if interrupted:
                raise
            screen.note("Ctrl-C once more, Ctrl-D or /exit ends.")
            interrupted = True
            continue
        interrupted = False
        handle(chat, typed, screen)


def _toolbar(chat: Chat, screen: Screen) -> Callable[[], str]:
    """Gather what the toolbar says once per line; it is drawn at every key."""
    status = status_of(chat)
    return lambda: status_line(status, screen.look)


def handle(chat: Chat, typed: Typed, screen: Screen) -> None:
    """Run what was typed; what goes wrong is said, and the conversation goes on."""
    try:
        if is_command(typed.text) and not typed.literal:
            run_command(chat, typed.text)
        elif typed.text.strip() or chat.attached:
            chat.say(typed.text.strip("\n") if "\n" in typed.text.strip() else typed.text.strip())
    except ClosedPipe:
        raise
    except TrimkvError as error:
        screen.error(error.message, error.hint)


def run_turn(chat: Chat, screen: Screen, begin: Callable[[Callable[[], bool]], Steps]) -> None:
    """Show an answer while it is made, then save; the first Ctrl-C ends it with what there is."""
    conversation = chat.conversation
    view = AnswerView(
        screen,
        markdown=chat.shown.markdown,
        thoughts=cast("ThoughtStyle", chat.shown.thoughts),
        in_thought=conversation.starts_in_thought,
    )
    with _ctrl_c_noted() as pressed, keys_held_back():
        meter = _Meter(conversation, screen, view)
        steps = begin(pressed)
        try:
            for events in steps:
                for event in events:
                    view.push(event.text)
                    meter.generated += len(event.token_ids)
                meter.tick()
        finally:
            view.close()
    reason = conversation.turns[-1].finish_reason
    if reason == "length":
        screen.note(f"stopped after {conversation.params.max_tokens} tokens; /continue goes on")
    elif reason == "abort":
        screen.note("stopped; /continue goes on")
    chat.autosave.save(conversation)


class _Meter:
    """Show how a turn goes on: what was read, then how fast it is written; at most 4 times a second, 1 on a CPU."""

    def __init__(self, conversation: Conversation, screen: Screen, view: AnswerView) -> None:
        self.generated = 0
        self._conversation = conversation
        self._screen = screen
        self._view = view
        self._llm = conversation.llm
        self._read_before = self._llm.stats.prefill_tokens
        self._seen_before = conversation.seen
        self._interval = 1.0 if self._llm.facts.plan.device == "cpu" else 0.25
        self._next = time.monotonic() + 0.2
        self._first_token = 0.0

    def tick(self) -> None:
        """Draw the line if it is time to."""
        now = time.monotonic()
        if self.generated and not self._first_token:
            self._first_token = now
        if now < self._next or not self._screen.moves or self._view.mid_line:
            return
        self._next = now + self._interval
        self._screen.passing(self._line(now))

    def _line(self, now: float) -> str:
        look = self._screen.look
        read = self._llm.stats.prefill_tokens - self._read_before
        if not self.generated:
            return f"reading {read:,} of {self._conversation.tokens_to_read:,} tokens"
        seen = self._seen_before + read + self.generated
        elapsed = now - self._first_token
        plan = self._llm.facts.plan
        facts = [f"kept {min(seen, plan.kv_budget):,}/{seen:,}"]
        if elapsed > 0 and self.generated > 1:
            facts.append(f"{(self.generated - 1) / elapsed:.1f} tok/s")
        preview = self._view.preview
        room = look.width - len(look.dot.join(facts)) - 4
        return f"{preview[-room:] if room > 0 else ''}{look.dot if preview else ''}{look.dot.join(facts)}"


def status_of(chat: Chat) -> Status:
    """Gather what the toolbar says between two turns."""
    conversation = chat.conversation
    llm, stats, seen = conversation.llm, conversation.last_stats, conversation.seen
    return Status(
        model=llm.facts.model_id,
        kept=min(seen, llm.facts.plan.kv_budget),
        seen=seen,
        slots=llm.facts.plan.kv_budget,
        horizon=llm.horizon(conversation.row)[0] if conversation.row is not None else None,
        tps=_speed(stats.completion_tokens, stats.ttft_s, stats.total_s) if stats is not None else None,
        budget_bytes=llm.facts.plan.budget_bytes,
        peak_bytes=llm.peak_bytes,
        attached=len(chat.attached),
        must_reread=conversation.must_reread,
    )


def _speed(tokens: int, ttft_s: float | None, total_s: float) -> float | None:
    return (tokens - 1) / (total_s - ttft_s) if ttft_s is not None and tokens > 1 and total_s > ttft_s else None


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
