"""Tokens that are never evicted: the system message, sinks, the newest, and the two ends of each prompt."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trimkv_cli.errors import UsageError

_EXAMPLE = "system,sinks:4,recent:64,prompt:10%"
Span = tuple[int, int]  # positions, from first to behind the last


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of tokens, or a share of the slots in percent."""

    amount: int
    is_share: bool = False

    def count(self, slots: int) -> int:
        """Count the tokens where each head has `slots` slots, at least 1."""
        return max(1, slots * self.amount // 100) if self.is_share else self.amount

    def __str__(self) -> str:
        return f"{self.amount}%" if self.is_share else str(self.amount)


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Where a sequence's newest prompt stands and its first one ends.

    In the first one a `system` message may end, and what is `shared`, of which others get a copy (0 = there is none).
    """

    start: int = 0
    stop: int = 0
    first: int = 0
    system: int = 0
    shared: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """Pin the system message, the first `sinks`, the newest `recent` tokens, the ends of prompts: their score is +inf.

    A `system` message of more tokens than that is not pinned; True is without a limit. The ends of a `prompt`, so many
    each, are released when the sequence's next one begins, but for the beginning of the first.
    """

    system: Amount | bool = False
    sinks: int = 0
    recent: int = 0
    prompt: Amount | None = None

    @classmethod
    def parse(cls, text: str | None) -> Pins:
        """Read `system,sinks:4,recent:64,prompt:10%`; None and `none` pin nothing, `system:25%` no longer message.

        Raises:
            UsageError: it is something else.
        """
        counts, prompt = {"sinks": 0, "recent": 0}, None
        system: Amount | bool = False
        for part in text.split(",") if text not in (None, "none") else ():
            found = re.fullmatch(r"(system|sinks|recent|prompt):([1-9]\d{0,8})(%?)", part.strip())
            if part.strip() == "system":
                system = True
            elif found and found[1] in ("system", "prompt"):
                amount = Amount(int(found[2]), is_share=found[3] == "%")
                system, prompt = (amount, prompt) if found[1] == "system" else (system, amount)
            elif found and not found[3]:
                counts[found[1]] = int(found[2])
            else:
                wrong = part.strip() or "nothing"
                raise UsageError(f"--pin {text}: {wrong!r} cannot be pinned", hint=f"--pin {_EXAMPLE}")
        return cls(system=system, prompt=prompt, **counts)

    def __str__(self) -> str:
        counts = {"sinks": self.sinks, "recent": self.recent, "prompt": self.prompt}
        parts = ["system" if self.system is True else f"system:{self.system}"] if self.system else []
        return ",".join([*parts, *(f"{name}:{count}" for name, count in counts.items() if count)])

    def ends(self, slots: int) -> int:
        """Count the tokens that are pinned at each end of a prompt, of which `slots` say how many a share is."""
        return 0 if self.prompt is None else self.prompt.count(slots)

    def system_most(self, slots: int) -> int | None:
        """Count the tokens of the longest system message that is pinned; None without a limit."""
        return self.system.count(slots) if isinstance(self.system, Amount) else None

    def _of_system(self, tokens: int, slots: int) -> int:
        """Count the tokens that are pinned of a system message, all or none."""
        most = self.system_most(slots)
        return tokens if self.system and (most is None or tokens <= most) else 0

    def for_good(self, prompt: PromptSpan, slots: int) -> int:
        """Count the first tokens of a sequence that stay whatever comes, sinks aside."""
        return max(self._of_system(prompt.system, slots), min(self.ends(slots), prompt.first))

    def for_now(self, prompt: PromptSpan, slots: int) -> tuple[Span, Span]:
        """Return what stays while the newest prompt is read and answered: its beginning and its end.

        The end does not reach into what others may get a copy of, whose ends are their own.
        """
        count, start, stop = self.ends(slots), prompt.start, prompt.stop
        return (start, min(start + count, stop)), (max(stop - count, start, prompt.shared), stop)

    def held(self, prompt: PromptSpan, seen: int, slots: int) -> int:
        """Count what is pinned in each head of a sequence of `seen` tokens."""
        first = max(self.sinks, self.for_good(prompt, slots))
        spans = ((0, first), *self.for_now(prompt, slots), (seen - self.recent, seen))
        return len({position for start, stop in spans for position in range(max(0, start), min(stop, seen))})

    def beside(self, slots: int, *, turns: bool) -> int:
        """Count what the ends of a sequence's newest prompt take at most beside what stays for good.

        Of its first prompt that is the end, as the beginning stays for good. With `turns` others follow, of which both
        ends are pinned: then three ends are at one moment, and no more, as those of the prompt before are released.
        """
        return self.ends(slots) * (2 if turns else 1)

    def count(self, prefix_len: int, slots: int, *, sinks: int = 0, turns: bool = False) -> int:
        """Count the tokens kept at most at once in a sequence whose system message has `prefix_len` tokens.

        `sinks` are the first ones, which the gate itself keeps; with `turns` its prompt is not the only one.
        """
        for_good = max(sinks, self.sinks, self._of_system(prefix_len, slots), self.ends(slots))
        return for_good + self.beside(slots, turns=turns) + self.recent

    def check(self, prefix_len: int, slots: int, *, sinks: int = 0, turns: bool = False) -> None:
        """Raise when pinned tokens, and the gate's own `sinks`, leave none of `slots` slots per head to the others.

        A layer with a shorter window holds the whole of it: nothing competes there.

        Raises:
            UsageError: there are as many of them as slots, or more.
        """
        count = self.count(prefix_len, slots, sinks=sinks, turns=turns)
        if count < slots:
            return
        where = "the first prompt's beginning and the ends of the newest" if turns else "each end of the prompt"
        named = f" ({self.ends(slots)} at {where})" if self.prompt is not None else ""
        enough = self.count(prefix_len, 2 * count, sinks=sinks, turns=turns) < 2 * count
        most = "30% in a conversation" if turns else "20% at most"
        raise UsageError(
            f"{count} pinned tokens{named} leave none of {slots} slots per head to the others",
            hint=f"--kv-budget {2 * count}, or pin less" if enough else f"pin less: --pin prompt:10% takes {most}",
        )
