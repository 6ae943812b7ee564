"""Grammars of answers: the tokens that may come next, row by row, as a mask over the vocabulary."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimkv_cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_COMPILED = 16


class Grammars:
    """Compile grammars (in llguidance's form) for one tokenizer; its vocabulary is analysed at the first use."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._eos = sorted(eos_token_ids)
        self._analysed: Any = None
        self._compiled: dict[str, Any] = {}

    def check(self, grammar: str) -> None:
        """Raise when no answer can be held to this grammar.

        Raises:
            UsageError: it is broken, or the model cannot follow any.
        """
        matcher = self._compile(grammar)
        if matcher.is_error():
            reason = matcher.get_error().strip()
        else:
            begun = matcher.deep_copy()
            begun.compute_bitmask()
            if not begun.is_error():
                return
            reason = "no answer satisfies it"
        raise UsageError(f"the format cannot be followed: {reason}", param="response_format")

    def matcher(self, grammar: str) -> Any:
        """Start following a grammar that `check` let pass."""
        return self._compile(grammar).deep_copy()

    def _compile(self, grammar: str) -> Any:
        """Compile a grammar, or take the one that was; the lines of a job mostly have the same few."""
        from llguidance import LLMatcher

        if grammar not in self._compiled:
            if len(self._compiled) >= _MOST_COMPILED:
                self._compiled.pop(next(iter(self._compiled)))
            self._compiled[grammar] = LLMatcher(self._vocabulary(), grammar, log_level=0)
        return self._compiled[grammar]

    def _vocabulary(self) -> Any:
        if self._analysed is None:
            from llguidance.hf import from_tokenizer

            if not self._eos:
                message = "the model has no token that ends an answer, so that it cannot follow a format"
                raise UsageError(message, param="response_format")
            try:
                self._analysed = from_tokenizer(self._tokenizer, eos_token=self._eos)
            except ValueError as error:
                message = f"this tokenizer cannot follow a format: {error}"
                raise UsageError(message, param="response_format") from error
        return self._analysed


class Matchers:
    """Follow the grammars of the rows that have one. Masks are made on the host, between two forwards."""

    def __init__(self) -> None:
        self._matchers: dict[int, Any] = {}

    def put(self, row: int, matcher: Any | None) -> None:
        """Begin a grammar in `row`, or end the one that is there."""
        if matcher is None:
            self._matchers.pop(row, None)
        else:
            self._matchers[row] = matcher

    def copy(self, row: int) -> Any | None:
        """Return the state of a row's grammar, apart from the row."""
        return self._matchers[row].deep_copy() if row in self._matchers else None

    def mask(self, scores: Tensor, rows: Sequence[int]) -> Tensor:
        """Return `scores` [B, V] with −inf where a row's grammar forbids a token."""
        guided = {place: self._matchers[row] for place, row in enumerate(rows) if row in self._matchers}
        if not guided:
            return scores
        forbidden = torch.zeros(scores.shape, dtype=torch.bool)
        for place, matcher in guided.items():
            forbidden[place] = ~_unpack(matcher.compute_bitmask(), scores.shape[-1])
        return scores.masked_fill(forbidden.to(scores.device, non_blocking=True), -torch.inf)

    def advance(self, row: int, token: int) -> None:
        """Take the new token of a row, if it follows a grammar."""
        if row in self._matchers:
            self._matchers[row].consume_token(token)

    def failure(self, row: int) -> str | None:
        """Say why a row can follow its grammar no further."""
        matcher = self._matchers.get(row)
        if matcher is None or not matcher.is_error():
            return None
        said = str(matcher.get_error()).strip()
        return "no token of the model's vocabulary follows the format" if said.startswith("<") else said  # its state


def _unpack(bits: bytes, vocab_size: int) -> Tensor:
    """Turn a little-endian bitmask into bool [V]; tokens past its end are forbidden."""
    packed = torch.frombuffer(bytearray(bits), dtype=torch.uint8)
    allowed = (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).bool().reshape(-1)[:vocab_size]
    return torch.nn.functional.pad(allowed, (0, vocab_size - len(allowed)))
