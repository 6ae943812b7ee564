"""Which tokens of every sequence are never evicted, because a user said so."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trimkv_cli.errors import UsageError

_EXAMPLE = "--pin system,sinks:4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """Pin the system message, the first `sinks` tokens, or both: their score is +inf (retention.md, section 3)."""

    system: bool = False
    sinks: int = 0

    @classmethod
    def parse(cls, text: str | None) -> Pins:
        """Read `system,sinks:4`; None pins nothing.

        Raises:
            UsageError: it is something else.
        """
        system, sinks = False, 0
        for part in (text or "").split(",") if text is not None else ():
            found = re.fullmatch(r"sinks:([1-9]\d{0,8})", part.strip())
            if part.strip() == "system":
                system = True
            elif found:
                sinks = int(found[1])
            else:
                raise UsageError(f"--pin {text}: {part.strip() or 'nothing'!r} cannot be pinned", hint=_EXAMPLE)
        return cls(system=system, sinks=sinks)

    def __str__(self) -> str:
        parts = (["system"] if self.system else []) + ([f"sinks:{self.sinks}"] if self.sinks else [])
        return ",".join(parts)

    def count(self, prefix_len: int) -> int:
        """Count the tokens pinned at the beginning of a sequence whose system message has `prefix_len` tokens."""
        return max(self.sinks, prefix_len if self.system else 0)

    def check(self, prefix_len: int, slots: int) -> None:
        """Raise when pinned tokens leave no slot to the others.

        Raises:
            UsageError: there are as many of them as slots, or more.
        """
        count = self.count(prefix_len)
        if count >= slots:
            raise UsageError(
                f"{count} pinned tokens leave none of {slots} slots per head to the others",
                hint=f"--kv-budget {2 * count}, or pin less",
            )
