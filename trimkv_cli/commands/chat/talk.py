"""The loop of a conversation: a line asked for, run as a slash command or a turn, the answer shown and saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from textwrap import fill
from typing import TYPE_CHECKING, cast

from trimkv_cli.commands.chat.slash_command import Chat, SlashCommand
from trimkv_cli.commands.chat.slash_memory import MEMORY
from trimkv_cli.commands.chat.slash_sessions import FILES, SESSIONS
from trimkv_cli.commands.chat.slash_settings import SETTINGS, TURNS
from trimkv_cli.errors import ClosedPipe, ContextOverflow, NotUtf8, TrimkvError, UsageError
from trimkv_cli.files import as_path, as_text, replaced
from trimkv_cli.ui.chat.answer import AnswerView, Meter, ThoughtStyle
from trimkv_cli.ui.chat.screen import Screen, Status, status_line
from trimkv_cli.ui.plain import neutralise

if TYPE_CHECKING:
    from trimkv_cli.chat.talk import Steps
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
    held = conversation.held
    meter = Meter(screen, view, seen=held.seen, slots=held.slots, interval_s=1.0 if conversation.slow else 0.25)
    steps = begin(chat.interrupts.noted)
    try:
        for events in steps:
            for event in events:
                view.push(event.text)
                meter.generated += len(event.token_ids)
            if meter.due:
                meter.draw(conversation.progress)
    finally:
        view.close()
    reason, goes_on = conversation.turns[-1].finish_reason, "; /continue goes on" if chat.here is not None else ""
    if reason == "length":
        screen.note(f"stopped after {len(conversation.turns[-1].token_ids)} tokens{goes_on}")
    elif reason == "abort":
        screen.note(f"stopped{goes_on}")
    chat.autosave.save(conversation)


def status_of(chat: Chat) -> Status:
    """Gather what the toolbar says between two turns."""
    conversation = chat.conversation
    held, stats = conversation.held, conversation.last_stats
    return Status(
        model=conversation.model_id,
        kept=held.kept,
        seen=held.seen,
        slots=held.slots,
        horizon=held.horizon,
        tps=_speed(stats.completion_tokens, stats.ttft_s, stats.total_s) if stats is not None else None,
        budget_bytes=held.budget_bytes,
        peak_bytes=held.peak_bytes,
        attached=len(chat.attached),
        must_reread=conversation.must_reread,
    )


def _speed(tokens: int, ttft_s: float | None, total_s: float) -> float | None:
    return (tokens - 1) / (total_s - ttft_s) if ttft_s is not None and tokens > 1 and total_s > ttft_s else None


_KEYS = (
    "",
    'Enter sends; Alt-Enter or Ctrl-J begins a new line, and three quotes (""") open and close a message of several.',
    "Ctrl-C stops an answer and keeps what there is of it; Ctrl-D ends. Ctrl-X Ctrl-E opens $EDITOR, Tab completes.",
    "What is pasted into an empty line is a message, whatever it begins with; so is what begins with a space.",
)


def _help(chat: Chat, argument: str) -> None:

    chosen = [find(argument)] if argument else list(COMMANDS)
    rows = [(f"/{command.name} {command.arguments}".rstrip(), command.help) for command in chosen]
    indent, width = max(len(name) for name, _ in rows) + 2, chat.display.look.width
    for name, text in rows:
        chat.display.print(fill(text, width, initial_indent=name.ljust(indent), subsequent_indent=" " * indent))
    for line in _KEYS if not argument else ():
        chat.display.print(fill(line, width))


def _exit(chat: Chat, _: str) -> None:
    chat.ended = True


def _names(_: Chat, __: str) -> Iterable[str]:

    return [command.name for command in COMMANDS]


BASICS = (
    SlashCommand(name="help", arguments="[COMMAND]", help="List the commands.", handler=_help, complete=_names),
    SlashCommand(name="exit", help="End; the session is saved already.", handler=_exit),
)

COMMANDS: tuple[SlashCommand, ...] = (*BASICS, *TURNS, *SETTINGS, *FILES, *SESSIONS, *MEMORY)


def find(name: str) -> SlashCommand:
    """Return the command called `name`, with or without its slash.

    Raises:
        UsageError: there is none; the nearest is suggested.
    """
    wanted = name.removeprefix("/")
    known = {command.name: command for command in COMMANDS}
    if wanted in known:
        return known[wanted]
    near = get_close_matches(wanted.lower(), known, n=1, cutoff=0.5) or [n for n in known if n.startswith(wanted[:1])]
    hint = f"/{near[0]}: {known[near[0]].help}" if near and wanted else "/help lists the commands"
    raise UsageError(
        f"there is no command /{neutralise(wanted)}; nothing was sent",
        hint=f"did you mean {hint}" if near and wanted else hint,
    )


def is_command(text: str) -> bool:
    """Say whether a typed text is a command: one line that begins with a slash."""
    return text.startswith("/") and "\n" not in text.strip("\n")


def run_command(chat: Chat, line: str) -> None:
    """Run a typed command; raises what it raises, UsageError where there is none, NotUtf8 for bytes in its argument."""
    name, _, argument = line.strip().partition(" ")
    command, argument = find(name), argument.strip()
    command.handler(chat, as_path(argument) if command.takes_path else as_text(argument, f"what follows {name}"))


def complete(chat: Chat, text: str) -> Iterator[tuple[str, int, str]]:
    """Yield (completion, characters that it replaces, help) for the text before the cursor."""
    if not is_command(text):
        return
    name, gap, argument = text[1:].partition(" ")
    if not gap:
        found = (command for command in COMMANDS if command.name.startswith(name))
        yield from ((f"{command.name} ", len(name), command.help) for command in found)
        return
    command = next((command for command in COMMANDS if command.name == name), None)
    for candidate in command.complete(chat, argument) if command is not None else ():
        if candidate.startswith(argument):
            yield candidate, len(argument), ""
