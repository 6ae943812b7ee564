"""What earlier tokens and a request's own bias do to a row's logits, counted on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimkv_cli.cache.transfers import to_device
from trimkv_cli.request import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """What one row's penalties remember; None for what its request does not use."""

    seen: Tensor | None  # int32 [V]: prompt and output
    made: Tensor | None  # int32 [V]: output


class Penalties:
    """Own token counts and biases `[rows, V]`, each allocated when the first request needs it."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._shape = (max_rows, vocab_size)
        self._device = device
        self._seen: Tensor | None = None  # int32: what the repetition penalty looks at
        self._made: Tensor | None = None  # int32: what presence and frequency penalties look at
        self._bias: Tensor | None = None  # float32

    def start(self, row: int, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        """Begin a request: its prompt counts for the repetition penalty alone."""
        if params.repetition_penalty != 1.0:
            ids = to_device(prompt_token_ids, self._device)
            ones = torch.ones(len(ids), dtype=torch.int32, device=self._device)
            self._seen_of(row).zero_().index_add_(0, ids, ones)
        if uses_output(params):
            self._made_of(row).zero_()
        self.write_bias(row, params)

    def write_bias(self, row: int, params: SamplingParams) -> None:
        """Set what a request adds to its logits; nothing for one without a bias."""
        if self._bias is not None:
            self._bias[row] = 0.0
        if params.logit_bias:
            if self._bias is None:
                self._bias = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
            ids, values = zip(*params.logit_bias, strict=True)
            self._bias[row, to_device(ids, self._device)] = torch.tensor(values, device=self._device)

    def apply(
        self, scores: Tensor, index: Tensor, host: Sequence[SamplingParams], factors: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """Return the scores [B, V] with the stages that some row asks for: bias, repetition, frequency, presence.

        `factors` holds repetition, frequency and presence penalty, float32 [B] each.
        """
        repetition, frequency, presence = factors
        if any(params.logit_bias for params in host):
            assert self._bias is not None
            scores = scores + self._bias[index]
        if any(params.repetition_penalty != 1.0 for params in host):
            assert self._seen is not None
            scores = penalize(scores, self._seen[index], repetition)
        if any(uses_output(params) for params in host):
            assert self._made is not None
            made = self._made[index]
            scores = scores - made * frequency[:, None] - (made > 0) * presence[:, None]
        return scores

    def count(self, index: Tensor, host: Sequence[SamplingParams], tokens: Tensor) -> None:
        """Count one new token [B] per row."""
        if any(params.repetition_penalty != 1.0 for params in host):
            assert self._seen is not None
            self._seen[index, tokens] += 1
        if any(uses_output(params) for params in host):
            assert self._made is not None
            self._made[index, tokens] += 1

    def replay(self, row: int, params: SamplingParams, token_ids: Sequence[int]) -> None:
        """Count the output of a row that has just been started."""
        ids = to_device(token_ids, self._device)
        ones = torch.ones(len(ids), dtype=torch.int32, device=self._device)
        if params.repetition_penalty != 1.0:
            self._seen_of(row).index_add_(0, ids, ones)
        if uses_output(params):
            self._made_of(row).index_add_(0, ids, ones)

    def save(self, row: int, params: SamplingParams) -> RowCounts:
        """Copy what a row's penalties remember."""
        return RowCounts(
            seen=self._seen_of(row).clone() if params.repetition_penalty != 1.0 else None,
            made=self._made_of(row).clone() if uses_output(params) else None,
        )

    def restore(self, row: int, params: SamplingParams, counts: RowCounts) -> None:
        """Put back what `save` copied, into this row or another."""
        if counts.seen is not None:
            self._seen_of(row).copy_(counts.seen)
        if counts.made is not None:
            self._made_of(row).copy_(counts.made)
        self.write_bias(row, params)

    def _seen_of(self, row: int) -> Tensor:
        if self._seen is None:
            self._seen = self._zeros()
        return self._seen[row]

    def _made_of(self, row: int) -> Tensor:
        if self._made is None:
            self._made = self._zeros()
        return self._made[row]

    def _zeros(self) -> Tensor:
        return torch.zeros(self._shape, dtype=torch.int32, device=self._device)


def uses_output(params: SamplingParams) -> bool:
    """Say whether a request's penalties look at what it has made."""
    return params.frequency_penalty != 0.0 or params.presence_penalty != 0.0


def penalize(logits: Tensor, counts: Tensor, penalty: Tensor) -> Tensor:
    """Make every token with a count in `counts` [B, V] less likely, by the factor `penalty` [B]."""
    factor = penalty[:, None]
    return torch.where(counts > 0, torch.where(logits < 0, logits * factor, logits / factor), logits)
