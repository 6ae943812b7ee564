"""What an answer cost, and where it was cut, as lines on stderr."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimkv_cli.ui.plain import print_note


def say_cut(finish_reason: str | None, tokens: int) -> None:
    """Say that an answer ended because of its length, if it did."""
    if finish_reason == "length":
        print_note(f"stopped after {tokens} tokens; --max-tokens N allows more")


def print_cost(*, read: int, written: int, cache: Mapping[str, Any], timing: Mapping[str, Any], last: str = "") -> None:
    """Print tokens, what the cache kept and the speeds, as a record has them; `last` says what of several it was."""
    kept, seen, evicted = cache["kept_per_head"], cache["seen_tokens"], cache["evicted"]
    decode = f", decode {timing['decode_tps']:.1f} tok/s" if timing["decode_tps"] else ""
    print_note(f"tokens   {read} prompt + {written} generated")
    print_note(f"cache    {kept} of {seen} tokens kept per head{last}, {evicted} evictions")
    print_note(f"speed    prefill {timing['prefill_tps']:.1f} tok/s{decode}")
