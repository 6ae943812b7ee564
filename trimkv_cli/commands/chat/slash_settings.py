"""Slash commands that change the conversation: /system, /set, /budget, /show, /clear, /undo and their like."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any, get_type_hints

from trimkv_cli.chat.turns import THINKS
from trimkv_cli.commands.chat.slash_command import Chat, SlashCommand, whole_number
from trimkv_cli.errors import TrimkvError, UsageError
from trimkv_cli.files import check_encoding
from trimkv_cli.request import SamplingParams
from trimkv_cli.ui.plain import neutralise
from trimkv_cli.units import format_size, parse_budget

_SWITCHES = {"on": True, "off": False}
_NOT_SETTABLE = {"logit_bias", "grammar", "logprobs"}  # they have no form that can be typed in a line
_VIEWS = {"markdown": ("on", "off"), "thoughts": ("show", "fold"), "think": ("on", "off", "auto")}


def _system(chat: Chat, argument: str) -> None:
    conversation = chat.conversation
    if not argument:
        chat.display.print(_line("system", conversation.system if conversation.system is not None else "none"))
        return
    conversation.system = None if argument == '""' else argument
    if conversation.turns:
        conversation.read_again()
        say_if_reread(chat)
    chat.autosave.write(conversation)


def _set(chat: Chat, argument: str) -> None:
    name, _, value = argument.partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if not name:
        _show(chat, "settings")
    elif name in _VIEWS:
        _set_view(chat, name, value)
    elif name == "encoding":
        chat.encoding = check_encoding(value) if value not in ("auto", "off") else None
        chat.display.note(_line(name, chat.encoding or "auto"))
    elif name in _sampling_names():
        chat.conversation.params = replace(chat.conversation.params, **{name: _parse(name, value)})
        chat.conversation.fits_rest &= name != "max_tokens"
        chat.autosave.write(chat.conversation)
        chat.display.note(_line(name, getattr(chat.conversation.params, name)))
    else:
        raise UsageError(f"there is no setting {name}", hint=f"one of {', '.join(_settings())}")


def _set_view(chat: Chat, name: str, value: str) -> None:
    if value not in _VIEWS[name]:
        raise UsageError(f"{name} cannot be {value!r}", hint=f"/set {name} {'|'.join(_VIEWS[name])}")
    if name == "markdown":
        chat.shown.markdown = _SWITCHES[value]
    elif name == "thoughts":
        chat.shown.thoughts = value
    else:
        chat.conversation.think = _SWITCHES.get(value)
        chat.autosave.write(chat.conversation)
    chat.display.note(_line(name, value))


def _show(chat: Chat, argument: str) -> None:
    parts = {"settings": _show_settings, "system": _system_lines, "session": _session_lines, "model": _model_lines}
    if argument and argument not in parts:
        raise UsageError(f"cannot show {argument!r}", hint=f"/show {'|'.join(parts)}")
    for name, part in parts.items():
        for line in part(chat) if argument in ("", name) else ():
            chat.display.print(line)


def _show_settings(chat: Chat) -> Iterable[str]:
    params = chat.conversation.params
    yield from (_line(name, getattr(params, name)) for name in _sampling_names())
    yield _line("think", THINKS[chat.conversation.think])
    yield _line("encoding", chat.encoding or "auto")
    yield _line("markdown", "on" if chat.shown.markdown else "off")
    yield _line("thoughts", chat.shown.thoughts)


def _system_lines(chat: Chat) -> Iterable[str]:
    yield _line("system", chat.conversation.system if chat.conversation.system is not None else "none")


def _session_lines(chat: Chat) -> Iterable[str]:
    yield _line("session", chat.autosave.name or "not stored")
    yield _line("turns", len(chat.conversation.turns))
    yield _line("undo", f"{max(0, len(chat.conversation.snapshots.counts) - 1)} states before the last one")


def _model_lines(chat: Chat) -> Iterable[str]:
    yield from (_line(name, value) for name, value in chat.conversation.facts.items())


def _line(name: str, value: object) -> str:
    return neutralise(f"{name:18} {_in_words(value)}")


def _in_words(value: object) -> str:
    """Return a value as one types it."""
    if isinstance(value, tuple):
        return ", ".join(map(_in_words, value)) or "off"
    return {True: "on", False: "off", None: "off"}[value] if value is None or isinstance(value, bool) else str(value)


def _sampling_names() -> list[str]:
    return [field.name for field in fields(SamplingParams) if field.name not in _NOT_SETTABLE]


def _settings() -> list[str]:
    return [*_sampling_names(), *_VIEWS, "encoding"]


def _parse(name: str, value: str) -> Any:
    """Read a value of a sampling parameter; `off` is the value that does nothing."""
    kind = get_type_hints(SamplingParams)[name]
    if value == "off":
        return next(field.default for field in fields(SamplingParams) if field.name == name)
    try:
        if kind is bool:
            return _SWITCHES[value]
        if kind in (int, int | None):
            return int(value)
        return (value,) if name == "stop" else float(value)
    except (ValueError, KeyError):
        wanted = {bool: "on or off", int: "a whole number", int | None: "a whole number"}.get(kind, "a number")
        raise UsageError(f"{name} cannot be {value!r}", hint=f"/set {name} takes {wanted}, or off") from None


def _complete_set(_: Chat, argument: str) -> Iterable[str]:
    name, gap, __ = argument.partition(" ")
    if not gap:
        return _settings()
    return [f"{name} {value}" for value in _VIEWS.get(name, ())]


def _complete_show(_: Chat, __: str) -> Iterable[str]:
    return ("settings", "system", "session", "model")


def _budget(chat: Chat, argument: str) -> None:
    conversation = chat.need_cache("budget")
    llm = conversation.llm
    if not argument:
        raise UsageError("/budget needs a size", hint="/budget 6GiB for all memory, /budget 256 for slots per head")
    if argument.isdecimal():
        done = llm.resize(int(argument))
    else:
        budget = parse_budget(argument)
        if budget.kind != "bytes":
            raise UsageError(f"/budget takes no {argument!r}", hint="/budget 6GiB, or /budget 256 for slots per head")
        done = llm.set_budget(budget.amount)
        chat.autosave.options["budget"] = argument
    chat.autosave.options["kv_budget"] = str(done.kv_budget)
    conversation.snapshots.use(llm.fingerprint, llm.kept.fitted)
    chat.autosave.save(conversation)
    sizes = f"{format_size(done.kv_bytes_before)} to {format_size(done.kv_bytes)} of cache"
    chat.display.note(f"{done.kv_budget_before} to {done.kv_budget} slots per head, {sizes}; {done.evicted:,} evicted")


SETTINGS = (
    SlashCommand(
        name="system", arguments="[TEXT]", help='Show or change the system message; "" for none.', handler=_system
    ),
    SlashCommand(
        name="set", arguments="NAME VALUE", help="Change a setting, as /set temperature 0.7 or /set thoughts fold.",
        handler=_set, complete=_complete_set,
    ),
    SlashCommand(
        name="budget", arguments="SIZE", help="Change all memory (6GiB) or slots per head (256); fewer evict at once.",
        handler=_budget,
    ),
    SlashCommand(
        name="show", arguments="[PART]", help="Show settings, system, session or model.", handler=_show,
        complete=_complete_show,
    ),
)  # fmt: skip


def say_if_reread(chat: Chat) -> None:
    """Say that the next message makes the model read again, if it does."""
    if chat.conversation.must_reread:
        why = chat.conversation.why_lost or "no state of the cache is left from then"
        chat.display.note(f"{why}: the next message makes the model read the turns again, and answers may differ")


def _clear(chat: Chat, _: str) -> None:
    chat.conversation.clear()
    kept, chat.attached = chat.autosave.name, []
    chat.autosave.start_anew()
    chat.display.note(f"a new conversation; /load {kept} goes back" if kept else "a new conversation")


def _undo(chat: Chat, argument: str) -> None:
    gone = chat.conversation.undo(whole_number(argument, 1))
    chat.autosave.write(chat.conversation)
    turns = f"{len(gone)} turns" if len(gone) > 1 else "1 turn"
    chat.display.note(f"took back {turns}; {len(chat.conversation.turns)} left")
    say_if_reread(chat)


def _regen(chat: Chat, _: str) -> None:
    if not chat.conversation.turns:
        raise UsageError("there is no answer to make again", hint="send a message first")
    (last,) = chat.conversation.undo()
    if chat.conversation.params.greedy:
        chat.display.note("greedy: the answer will be the same; /set temperature 0.7 lets it vary")
    say_if_reread(chat)
    try:
        chat.run(lambda stopped: chat.conversation.say(last.user, stopped, attempt=last.attempt + 1))
    except TrimkvError:
        chat.conversation.redo([last])
        raise


def _edit(chat: Chat, _: str) -> None:
    if not chat.conversation.turns:
        raise UsageError("there is no message to edit", hint="send one first")
    (last,) = chat.conversation.undo()
    chat.autosave.write(chat.conversation)
    chat.draft = last.user
    chat.display.note("the last turn is taken back; edit its message and send it")
    say_if_reread(chat)


def _continue(chat: Chat, _: str) -> None:
    chat.run(chat.conversation.go_on)


TURNS = (
    SlashCommand(name="clear", help="Begin a new conversation; the old one stays saved.", handler=_clear),
    SlashCommand(name="regen", help="Take back the last answer and make another one.", handler=_regen),
    SlashCommand(name="undo", arguments="[N]", help="Take back the last turn, or the last N.", handler=_undo),
    SlashCommand(name="edit", help="Take back the last turn and edit its message.", handler=_edit),
    SlashCommand(name="continue", help="Go on with an answer that was cut.", handler=_continue),
)
