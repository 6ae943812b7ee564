"""Slash commands about the cache: /stats, /cache, /map, /why, /pin."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from trimkv_cli.commands.chat.slash_command import Chat, SlashCommand
from trimkv_cli.commands.memory import memory_use, pieces_of, weights_line
from trimkv_cli.errors import UsageError
from trimkv_cli.events import Retained
from trimkv_cli.ui.cache_panel import Span, cache_panel, head_strip, memory_map, turn_map
from trimkv_cli.ui.inspection import headline
from trimkv_cli.ui.plain import neutralise
from trimkv_cli.ui.tokens import next_out_line, pinned_line, survival_table, token_view

if TYPE_CHECKING:
    from trimkv_cli.events import RequestStats

_CONTEXT = 40  # tokens shown around what was asked about
_MOST_ROWS = 60


def _stats(chat: Chat, _: str) -> None:
    conversation, stats = chat.conversation, chat.conversation.last_stats
    if not conversation.turns:
        raise UsageError("nothing has been generated yet", hint="send a message first")
    if stats is None:
        _stats_of_before(chat)
    else:
        _stats_of_last(chat, stats)
    if chat.here is None:
        return
    run = chat.here.llm.stats
    chat.display.print(f"weights    {weights_line(chat.here.llm)}")
    read = f"{run.prefill_tokens:,} tokens read in {run.prefill_s:.1f} s"
    chat.display.print(f"all turns  {read}, {run.decode_tokens:,} generated in {run.decode_s:.1f} s")


def _stats_of_before(chat: Chat) -> None:
    """Say what is known of a turn that an earlier run made."""
    conversation = chat.conversation
    turn, held = conversation.turns[-1], conversation.held
    chat.display.print(
        f"last turn  {turn.prompt_tokens} tokens read, {len(turn.token_ids)} generated, in an earlier run"
    )
    if held.seen and not conversation.must_reread:
        chat.display.print(f"cache      {held.kept} of {held.seen} tokens kept per head")


def _stats_of_last(chat: Chat, stats: RequestStats) -> None:
    cache = stats.cache
    decode_s = stats.total_s - (stats.ttft_s if stats.ttft_s is not None else stats.total_s)
    speed = f"{(stats.completion_tokens - 1) / decode_s:.1f} tok/s" if decode_s > 0 else "no speed yet"
    ttft = f"{stats.ttft_s:.2f} s" if stats.ttft_s is not None else "never"
    print_line = chat.display.print
    print_line(f"last turn  {stats.prompt_tokens} tokens read, {stats.completion_tokens} generated at {speed}")
    print_line(f"           first token after {ttft}")
    print_line(
        f"cache      {cache.kept_per_head} of {cache.seen_tokens} tokens kept per head, {cache.evicted:,} evictions"
    )


def _cache(chat: Chat, _: str) -> None:
    retained, look = _retained(chat, "cache"), chat.display.look
    pieces = _pieces(chat)
    chat.display.print(headline(retained, look))
    llm = chat.need_cache("cache").llm
    chat.display.print(look.paint(cache_panel(memory_use(llm, seen=retained.seen), look)))
    chat.display.print(look.paint(head_strip(retained, look)))
    chat.display.print(next_out_line(retained, pieces, look))


def _map(chat: Chat, _: str) -> None:
    retained, look = _retained(chat, "map"), chat.display.look
    chat.display.print(headline(retained, look))
    chat.display.print(look.paint(memory_map(retained, look)))
    chat.display.print(look.paint(turn_map(retained, list(_spans(chat)), look)))
    chat.display.print(next_out_line(retained, _pieces(chat), look))
    if pinned := pinned_line(retained, look):
        chat.display.print(pinned)


def _why(chat: Chat, argument: str) -> None:
    retained, look, pieces = _retained(chat, "why"), chat.display.look, _pieces(chat)
    places = find_text(pieces, argument, command="why") if argument else [_last_turn(chat, retained)]
    rows = _MOST_ROWS
    for number, (start, stop) in enumerate(places, start=1):
        if rows <= 0:
            chat.display.note(f"{len(places) - number + 1} more places are not shown; name a longer text")
            return
        if len(places) > 1:
            chat.display.print(f"place {number} of {len(places)}{_where(chat, start)}")
        first, last = max(0, start - _CONTEXT), min(retained.seen, stop + _CONTEXT)
        chat.display.print(look.paint(token_view(retained, pieces, look, start=first, stop=last)))
        shown = min(stop, start + rows)
        chat.display.print(look.paint(survival_table(retained, pieces, look, start=start, stop=shown)))
        if shown < stop:
            chat.display.note(f"{stop - shown} more tokens are not listed; name a shorter text")
        rows -= stop - start


def _where(chat: Chat, position: int) -> str:
    """Say in which turn a token stands, and on whose side of it; nothing outside of all."""
    for number, turn in enumerate(chat.conversation.turns, start=1):
        if turn.first <= position < turn.seen:
            asked = position < turn.first + turn.prompt_tokens
            return f", in {'message' if asked else 'the answer to message'} {number}"
    return ""


def _pin(chat: Chat, argument: str) -> None:
    retained, pieces = _retained(chat, "pin"), _pieces(chat)
    if argument:
        chat.need_cache("pin").pin(range(*find_text(pieces, argument, command="pin")[-1]))
        chat.autosave.save(chat.conversation)
        retained = _retained(chat, "pin")
    held, line = retained.pinned(), pinned_line(retained, chat.display.look)
    if line is None:
        raise UsageError("nothing is pinned", hint="/pin with words of a message keeps them for good")
    most = max(sum(position in held for position in head.positions) for _, head in retained.heads)
    slots = max(layer.slots for layer in retained.layers)
    words = "".join(pieces[position] for position in held)
    chat.display.print(neutralise(f"pinned: {' '.join(words.split())}"))
    chat.display.print(line.removeprefix("pinned: "))
    chat.display.print(f"at most {most} of {slots} slots in a head; /undo of this turn takes it back")


def find_text(pieces: list[str], text: str, *, command: str) -> list[tuple[int, int]]:
    """Return the tokens, from first to behind the last, of each place where a text stands, in capitals or not.

    Raises:
        UsageError: it stands nowhere.
    """
    ends = list(accumulate(map(len, pieces)))
    found = re.finditer(re.escape(text), "".join(pieces), re.IGNORECASE)
    places = [(bisect_right(ends, match.start()), bisect_left(ends, match.end()) + 1) for match in found]
    if not places:
        hint = f"/{command} with words of a message"
        raise UsageError(f"{text!r} does not stand in what the model has read", hint=hint)
    return places


def _last_turn(chat: Chat, retained: Retained) -> tuple[int, int]:
    turn = chat.conversation.turns[-1]
    return turn.first, min(retained.seen, turn.first + turn.prompt_tokens)


def _spans(chat: Chat) -> Iterator[Span]:
    """Yield message and answer of each turn; turns that were read again stand together in a later one's message."""
    for number, turn in enumerate(chat.conversation.turns, start=1):
        if turn.seen:
            middle = min(turn.seen, turn.first + turn.prompt_tokens)
            yield Span(f"{number:4} you", turn.user, turn.first, middle)
            yield Span("model", turn.answer, middle, turn.seen)


def _retained(chat: Chat, command: str) -> Retained:
    conversation = chat.need_cache(command)
    if conversation.row is None:
        raise UsageError("the cache is empty", hint="send a message first")
    return conversation.llm.kept.retained(conversation.row)


def _pieces(chat: Chat) -> list[str]:
    assert chat.here is not None, "_retained comes first"
    assert chat.here.row is not None, "_retained comes first"
    return pieces_of(chat.here.llm, chat.here.llm.kept.token_ids(chat.here.row))


MEMORY = (
    SlashCommand(name="stats", help="Counts and speed of the last turn and of all.", handler=_stats),
    SlashCommand(name="cache", help="Bytes of each part, how full each head is, what goes next.", handler=_cache),
    SlashCommand(name="map", help="Which parts of the conversation are remembered.", handler=_map),
    SlashCommand(
        name="why", arguments="[TEXT]", help="Which heads keep the tokens of a text, and for how much longer.",
        handler=_why,
    ),
    SlashCommand(
        name="pin", arguments="[TEXT]", help="Never evict what is still held of a text; list what is pinned.",
        handler=_pin,
    ),
)  # fmt: skip
