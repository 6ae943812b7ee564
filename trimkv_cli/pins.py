"""Which tokens of every sequence are never evicted, because a user said so."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trimkv_cli.errors import UsageError

_EXAMPLE = "--pin system,sinks:4,recent:64"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """Pin the system message, the first `sinks` and the newest `recent` tokens: their score is +inf."""

    system: bool = False
    sinks: int = 0
    recent: int = 0

    @classmethod
    def parse(cls, text: str | None) -> Pins:
        """Read `system,sinks:4,recent:64`; None pins nothing.

        Raises:
            UsageError: it is something else.
        """
        system, counts = False, {"sinks": 0, "recent": 0}
        for part in (text or "").split(",") if text is not None else ():
            found = re.fullmatch(r"(sinks|recent):([1-9]\d{0,8})", part.strip())
            if part.strip() == "system":
                system = True
            elif found:
                counts[found[1]] = int(found[2])
            else:
                raise UsageError(f"--pin {text}: {part.strip() or 'nothing'!r} cannot be pinned", hint=_EXAMPLE)
        return cls(system=system, **counts)

    def __str__(self) -> str:
        counts = {"sinks": self.sinks, "recent": self.recent}
        parts = ["system"] if self.system else []
        return ",".join([*parts, *(f"{name}:{count}" for name, count in counts.items() if count)])

    def count(self, prefix_len: int, sinks: int = 0) -> int:
        """Count the tokens kept at once in a sequence whose system message has `prefix_len` tokens.

        `sinks` are the first ones, which the gate itself keeps.
        """
        return max(sinks, self.sinks, prefix_len if self.system else 0) + self.recent

    def check(self, prefix_len: int, slots: int, *, sinks: int = 0) -> None:
        """Raise when pinned tokens, and the gate's own `sinks`, leave no slot to the others.

        Raises:
            UsageError: there are as many of them as slots, or more.
        """
        count = self.count(prefix_len, sinks)
        if count >= slots:
            raise UsageError(
                f"{count} pinned tokens leave none of {slots} slots per head to the others",
                hint=f"--kv-budget {2 * count}, or pin less",
            )
