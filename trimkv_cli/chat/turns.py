"""The turns of one conversation, as plain values that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from trimkv_cli.errors import InputError, UsageError
from trimkv_cli.events import FinishReason

THINKS: Mapping[bool | None, str] = {True: "on", False: "off", None: "auto"}  # a template's own way
_SEED_STEP = 1_000_003  # far more than a conversation has turns, so that no two attempts share a seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message and its answer; `seed` and `attempt` decide the tokens, `first` and `seen` where they stand.

    `first` is the position of the first token that was fed for the turn, `prompt_tokens` how many of them came before
    the answer, `seen` how many tokens the cache had seen after it.
    """

    user: str
    answer: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    attempt: int = 0
    first: int = 0
    prompt_tokens: int = 0
    seen: int = 0

    @classmethod
    def from_json(cls, value: Any) -> Turn:
        """Take a turn apart that `asdict` made.

        Raises:
            InputError: it is not one.
        """
        try:
            turn = cls(**{**value, "token_ids": tuple(value["token_ids"])})
        except (TypeError, KeyError) as error:
            raise InputError(f"not a turn of a session: {error}") from None
        if turn.finish_reason not in get_args(FinishReason) or not isinstance(turn.user + turn.answer, str):
            raise InputError("not a turn of a session: its values are of other kinds")
        return turn

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def seed_of(seed: int, turn: int, attempt: int) -> int:
    """Return the seed of the `turn`-th turn (from 1): its own, and another one for every new attempt at it."""
    return (seed + turn + attempt * _SEED_STEP) % 2**63


def take_back(turns: list[Turn], count: int) -> tuple[list[Turn], list[Turn]]:
    """Return the turns without the last ones, and those.

    Raises:
        UsageError: there are not that many.
    """
    if not 1 <= count <= len(turns):
        have = f"there are {len(turns)} turns" if turns else "nothing has been said yet"
        raise UsageError(f"cannot take back {count}: {have}")
    kept = len(turns) - count
    return turns[:kept], turns[kept:]


def split_thought(answer: str, *, inside: bool = False) -> tuple[str, str]:
    """Split an answer into its reasoning and what follows; `inside` when the prompt has opened `<think>` already."""
    text = answer.lstrip()
    if not inside and not text.startswith("<think>"):
        return "", answer
    thought, closed, rest = text.removeprefix("<think>").partition("</think>")
    return (thought.strip("\n"), rest.lstrip("\n")) if closed else (thought, "")


def to_messages(system: str | None, turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Return the messages of a conversation in OpenAI's form."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    for turn in turns:
        messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
    return messages


def turns_from_json(values: Any) -> list[Turn]:
    """Read a list of turns; raises as `Turn.from_json` does."""
    if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
        raise InputError("the turns of a session are not a list of objects")
    return [Turn.from_json(value) for value in values]
