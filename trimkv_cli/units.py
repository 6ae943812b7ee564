"""Sizes and times as people write them: "6GiB", "80%", "free-2GiB", "1h30m", and sizes back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from trimkv_cli.errors import UsageError

Value = TypeVar("Value")

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgtp]?)(ib|b|)", re.IGNORECASE)
_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_DURATION = re.compile("".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in _SECONDS))


def read_flag(flag: str, text: str, read: Callable[[str], Value]) -> Value:
    """Read a flag's text, and let what is wrong with it name the flag; raises as `read` does."""
    try:
        return read(text)
    except UsageError as error:
        if flag not in error.message:
            error.message = f"{flag} {text}: {error.message}"
        raise


def parse_size(text: str) -> int:
    """Read a size in bytes; `GiB` and bare `G` are powers of 1024, `GB` powers of 1000.

    Raises:
        UsageError: not a number with a known unit.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3].lower() == "ib" and not match[2]):
        raise UsageError(f"{text!r} is not a size", hint="write it like 8GiB, 512MB, 4G or 1048576")
    number, power, suffix = match[1], _POWERS[match[2].lower()], match[3].lower()
    base = 1000 if suffix == "b" else 1024
    whole, _, fraction = number.partition(".")
    return int(whole + fraction) * int(base**power) // int(10 ** len(fraction))


def format_size(size_bytes: int, digits: int = 1) -> str:
    """Write bytes in the binary unit that leaves one to four digits before the point, and `digits` behind it."""
    value = float(size_bytes)
    if value < 1024:
        return f"{size_bytes} B"
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        value /= 1024
        if round(value, digits) < 1024 or unit == "PiB":
            break
    return f"{value:.{digits}f} {unit}"


def format_sizes(*sizes: int) -> tuple[str, ...]:
    """Write sizes that are compared with each other, with so many digits that different ones look different."""
    tries = (tuple(format_size(size, digits) for size in sizes) for digits in range(1, 15))
    exact = tuple(f"{size} B" for size in sizes)
    return next((written for written in tries if len(set(written)) == len(set(sizes))), exact)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A memory budget as asked for; `amount` is bytes, or whole percent of the device."""

    kind: Literal["bytes", "percent", "free", "auto"]
    amount: int = 0

    def resolve(self, *, total_bytes: int | None = None, free_bytes: int | None = None) -> int | None:
        """Give the bytes allowed, or None for no limit (`auto` where the free memory is not known).

        Raises:
            UsageError: a share of a device whose size is not known, or nothing left.
        """
        if self.kind == "auto":
            return None if free_bytes is None else free_bytes * 9 // 10
        base = {"bytes": self.amount, "percent": total_bytes, "free": free_bytes}[self.kind]
        if base is None:
            raise UsageError(f"the budget is a share of a device of unknown size ({self})", hint="try --budget 8GiB")
        allowed = {"bytes": base, "percent": base * self.amount // 100, "free": base - self.amount}[self.kind]
        if allowed <= 0:
            raise UsageError(f"the budget {self} leaves no memory at all", hint="try --budget 8GiB")
        return allowed

    def __str__(self) -> str:
        names = {"bytes": str(self.amount), "percent": f"{self.amount}%", "free": f"free-{self.amount}"}
        return names.get(self.kind, "auto")


def parse_budget(text: str) -> Budget:
    """Read `--budget`: a size, `80%`, `free-2GiB` or `auto`.

    Raises:
        UsageError: none of these, or nothing at all.
    """
    text = text.strip()
    if text.lower() == "auto":
        return Budget(kind="auto")
    if text.lower().startswith("free-"):
        return Budget(kind="free", amount=parse_size(text[len("free-") :]))
    if percent := re.fullmatch(r"(\d{1,3})\s*%", text):
        return Budget(kind="percent", amount=_within(int(percent[1]), 1, 100, text))
    return Budget(kind="bytes", amount=_within(parse_size(text), 1, 2**63 - 1, text))


def _within(amount: int, low: int, high: int, text: str) -> int:
    if low <= amount <= high:
        return amount
    raise UsageError(f"a budget of {text} is out of range", hint="write it like 8GiB, 80%, free-2GiB or auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceBytes:
    """A KV budget given as the bytes of one sequence, instead of slots per head."""

    amount: int


def parse_kv_budget(text: str) -> int | SequenceBytes:
    """Read `--kv-budget`: a bare number is slots per KV head, a number with a unit is bytes per sequence.

    Raises:
        UsageError: neither, or zero.
    """
    text = text.strip()
    budget = int(text) if text.isascii() and text.isdigit() else SequenceBytes(amount=parse_size(text))
    if budget == 0 or budget == SequenceBytes(amount=0):
        raise UsageError("a KV budget of 0 keeps no token", hint="try --kv-budget 512 (slots) or 256MiB (bytes)")
    return budget


def parse_duration(text: str) -> float:
    """Read a time in seconds: `90s`, `10m`, `1h30m`, `2d`; a bare number is seconds.

    Raises:
        UsageError: none of these.
    """
    text = text.strip().lower()
    match = _DURATION.fullmatch(f"{text}s" if text[-1:].isdigit() else text)
    if match is None or not text:
        raise UsageError(f"{text!r} is not a time", hint="write it like 90s, 10m, 1h30m or 2d")
    return sum(float(number) * unit for number, unit in zip(match.groups(), _SECONDS.values(), strict=True) if number)
