"""The loop of a conversation: ask for a line, run a command or a turn, show the answer, save."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from trimkv_cli.commands.chat.slash_command import Chat
from trimkv_cli.commands.chat.slash_table import is_command, run_command
from trimkv_cli.errors import ClosedPipe, ContextOverflow, NotUtf8, TrimkvError
from trimkv_cli.files import as_text, replaced
from trimkv_cli.ui.chat.answer import AnswerView, Meter, ThoughtStyle
from trimkv_cli.ui.chat.screen import Screen, Status, status_line
from trimkv_cli.ui.plain import neutralise

if TYPE_CHECKING:
    from trimkv_cli.chat.conversation import Steps
    from trimkv_cli.ui.chat.prompt import ChatPrompt, Typed


def talk(chat: Chat, prompt: ChatPrompt, screen: Screen) -> None:
    """Go on until /exit or Ctrl-D; Ctrl-C twice in an empty line raises KeyboardInterrupt."""
    hinted = False
    with chat.interrupts:
        while not chat.ended:
            draft, chat.draft = chat.draft, ""
            try:
                typed = prompt.ask(draft, _toolbar(chat, screen))
            except EOFError:
                return
            except KeyboardInterrupt:
                if hinted:
                    raise
                screen.note("Ctrl-C once more, Ctrl-D or /exit ends.")
                hinted = True
                continue
            hinted = False
            if prompt.erases:
                screen.print(neutralise("> " + typed.text.rstrip("\n").replace("\n", "\n  ")))
            chat.interrupts.clear()
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
            text = as_text(typed.text, "the message")
            chat.say(text.strip("\n") if "\n" in text.strip() else text.strip())
    except ClosedPipe:
        raise
    except NotUtf8 as error:
        screen.error(error.message, "the line is there again, with U+FFFD for what is not UTF-8")
        chat.draft = _again(typed)
    except ContextOverflow as error:
        ways = "/set max_tokens N asks for less, /clear begins a new conversation"
        names = ", ".join(name for name, _ in chat.attached)
        screen.error(error.message, f"/file none lets {names} go, {ways}" if names else ways)
    except TrimkvError as error:
        screen.error(error.message, error.hint)


def _again(typed: Typed) -> str:
    """Return what was typed, to be mended; a message that looks like a command stays one."""
    text = replaced(typed.text)
    return f" {text}" if typed.literal and is_command(text) else text


def run_turn(chat: Chat, screen: Screen, begin: Callable[[Callable[[], bool]], Steps]) -> None:
    """Show an answer while it is made, then save; the first Ctrl-C ends it with what there is."""
    conversation = chat.conversation
    view = AnswerView(
        screen,
        markdown=chat.shown.markdown,
        thoughts=cast("ThoughtStyle", chat.shown.thoughts),
        in_thought=conversation.starts_in_thought,
    )
    llm = conversation.llm
    read_before = llm.stats.prefill_tokens
    meter = Meter(
        screen,
        view,
        seen=conversation.seen,
        slots=llm.facts.plan.run.kv_budget,
        interval_s=1.0 if llm.facts.plan.run.device == "cpu" else 0.25,
    )
    steps = begin(chat.interrupts.noted)
    try:
        for events in steps:
            for event in events:
                view.push(event.text)
                meter.generated += len(event.token_ids)
            if meter.due:
                meter.draw(read=llm.stats.prefill_tokens - read_before, to_read=conversation.tokens_to_read)
    finally:
        view.close()
    reason = conversation.turns[-1].finish_reason
    if reason == "length":
        screen.note(f"stopped after {len(conversation.turns[-1].token_ids)} tokens; /continue goes on")
    elif reason == "abort":
        screen.note("stopped; /continue goes on")
    chat.autosave.save(conversation)


def status_of(chat: Chat) -> Status:
    """Gather what the toolbar says between two turns."""
    conversation = chat.conversation
    llm, stats, seen = conversation.llm, conversation.last_stats, conversation.seen
    return Status(
        model=llm.facts.model_id,
        kept=llm.kept.per_head(conversation.row) if conversation.row is not None else 0,
        seen=seen,
        slots=llm.facts.plan.run.kv_budget,
        horizon=llm.kept.horizon(conversation.row)[0] if conversation.row is not None else None,
        tps=_speed(stats.completion_tokens, stats.ttft_s, stats.total_s) if stats is not None else None,
        budget_bytes=llm.facts.plan.budget_bytes,
        peak_bytes=llm.peak_bytes,
        attached=len(chat.attached),
        must_reread=conversation.must_reread,
    )


def _speed(tokens: int, ttft_s: float | None, total_s: float) -> float | None:
    return (tokens - 1) / (total_s - ttft_s) if ttft_s is not None and tokens > 1 and total_s > ttft_s else None
