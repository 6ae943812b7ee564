"""Each row's next token, chosen on the device from its logits, parameters, seed and step alone, unless it is forced.

Stages and their order are those of transformers' `GenerationMixin._get_logits_processor`; nothing here reads the
device. What a row has not asked for changes nothing, so that all rows may go through the stages that some need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from trimkv_cli.cache.transfers import to_device
from trimkv_cli.engine.filters import FRACTION_ONE, draw, random_fraction, weigh, weigh_likeliest
from trimkv_cli.engine.grammars import Grammars, Matchers
from trimkv_cli.engine.penalties import Penalties, RowCounts, uses_output
from trimkv_cli.engine.thoughts import ThinkTags, Thought, no_thoughts
from trimkv_cli.errors import UsageError
from trimkv_cli.events import TokenLogprob
from trimkv_cli.plan.step import SAMPLED_ROWS
from trimkv_cli.request import SamplingParams

NO_TOKEN = -1  # instead of an id: the logits of that row are no numbers
_IDLE = SamplingParams(temperature=0.0)


class Form(IntEnum):
    """Which stages follow the penalties; each form has those of the ones before it."""

    GREEDY = 0
    DRAWN = 1  # temperature, min-p
    FILTERED = 2  # top-k, top-p: by a sort
    ENTROPY = 3  # top-h

    @classmethod
    def of(cls, params: SamplingParams) -> Form:
        """Return the least that a request needs."""
        if params.greedy:
            return cls.GREEDY
        if params.top_h is not None:
            return cls.ENTROPY
        return cls.FILTERED if params.top_k or params.top_p < 1.0 else cls.DRAWN


@dataclass(frozen=True, slots=True, kw_only=True)
class RowParams:
    """Hold sampling parameters on the device, one tensor [B] each; a fraction is an int64 in units of 2^-32."""

    greedy: Tensor  # bool
    penalty: Tensor  # float32
    frequency: Tensor  # float32
    presence: Tensor  # float32
    temperature: Tensor  # float32, 1 for greedy rows
    top_h: Tensor  # fraction; 0 = off
    top_k: Tensor  # int64; the vocabulary's size = off
    tail: Tensor  # fraction: the mass 1 − top_p that may be cut
    min_p: Tensor  # float32
    seed: Tensor  # int64

    @classmethod
    def empty(cls, max_rows: int, device: torch.device) -> RowParams:
        """Allocate parameters for `max_rows` rows, uninitialised."""
        floats = ("penalty", "frequency", "presence", "temperature", "min_p")
        dtypes = {"greedy": torch.bool} | dict.fromkeys(floats, torch.float32)
        tensors = {
            field.name: torch.empty(max_rows, dtype=dtypes.get(field.name, torch.int64), device=device)
            for field in fields(cls)
        }
        return cls(**tensors)

    def write(self, row: int, params: SamplingParams, vocab_size: int) -> None:
        """Change one row in place."""
        self.greedy[row] = params.greedy
        self.penalty[row] = params.repetition_penalty
        self.frequency[row] = params.frequency_penalty
        self.presence[row] = params.presence_penalty
        self.temperature[row] = 1.0 if params.greedy else params.temperature
        self.top_h[row] = round((params.top_h or 0.0) * FRACTION_ONE)
        self.top_k[row] = min(params.top_k or vocab_size, vocab_size)
        self.tail[row] = round((1.0 - params.top_p) * FRACTION_ONE)
        self.min_p[row] = params.min_p
        self.seed[row] = params.seed

    def at(self, index: Tensor | slice) -> RowParams:
        """Return some of the rows: a view of a slice, a copy of those that a tensor [B] names."""
        return RowParams(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerRow:
    """One row's state, kept aside so that a turn can be undone."""

    params: SamplingParams
    step: Tensor  # int64 scalar on the device
    counts: RowCounts
    matcher: Any | None  # where its grammar stands
    thought: Thought | None  # and its budget of reasoning


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log probabilities of some rows' tokens, and the likeliest ones, on the host once the device has come so far."""

    counts: Mapping[int, int]  # how many of the likeliest, by the row's number in its step
    own: Tensor  # [B']
    values: Tensor  # [B', most]
    ids: Tensor  # [B', most]

    def read(self) -> dict[int, TokenLogprob]:
        """Return them by number."""
        own, values, ids = self.own.tolist(), self.values.tolist(), self.ids.tolist()
        return {
            number: TokenLogprob(logprob=own[i], top=tuple(zip(ids[i], values[i], strict=True))[:count])
            for i, (number, count) in enumerate(self.counts.items())
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Selection:
    """The rows of one call, gathered once and kept until the rows or their parameters change."""

    rows: tuple[int, ...]
    index: Tensor
    params: RowParams
    host: tuple[SamplingParams, ...]


class Sampler:
    """Own the sampling state of up to `max_rows` rows: parameters, step, token counts, grammars, reasoning.

    A row that was never set, or was cleared, is greedy. Where no logit is a finite number, or one is NaN, the id chosen
    is `NO_TOKEN`.
    Rows that `must_be_told` run in step: their next token has to be told by `advance` before the next call.
    """

    def __init__(
        self,
        max_rows: int,
        vocab_size: int,
        device: torch.device | str,
        grammars: Grammars | None = None,
        tags: ThinkTags | None = None,
    ) -> None:
        self.max_rows = max_rows
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._host = [_IDLE] * max_rows
        self._params = RowParams.empty(max_rows, self.device)
        self._step = torch.zeros(max_rows, dtype=torch.int64, device=self.device)
        self._penalties = Penalties(max_rows, vocab_size, self.device)
        self._grammars = grammars
        self._matchers = Matchers()
        self._tags = tags
        self._thoughts: dict[int, Thought] = {}
        self._selections: dict[tuple[int, ...], _Selection] = {}
        for row in range(max_rows):
            self.clear_row(row)

    def check(self, params: SamplingParams) -> None:
        """Raise when parameters can never be honoured with this vocabulary and tokenizer.

        Raises:
            UsageError: a bias for a token that is not there, a grammar that cannot be followed, or a budget of
                reasoning for a model that knows none.
        """
        params.check_vocabulary(self.vocab_size)
        if params.think_budget is not None and self._tags is None:
            raise no_thoughts("the model")
        if params.grammar is None:
            return
        if self._grammars is None:
            raise UsageError("a format needs a tokenizer, and the model has none", param="response_format")
        self._grammars.check(params.grammar)

    def set_row(self, row: int, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        """Start a request in `row` at step 0; the prompt counts for the repetition penalty."""
        self._write(row, params)
        self._step[row] = 0
        self._penalties.start(row, params, prompt_token_ids)
        if params.grammar is not None:
            assert self._grammars is not None, "check comes first"
            self._matchers.put(row, self._grammars.matcher(params.grammar))
        if params.may_think_too_long:
            assert self._tags is not None, "check comes first"
            self._thoughts[row] = self._tags.follow(prompt_token_ids, params.think_budget)

    def replay(self, row: int, token_ids: Sequence[int]) -> None:
        """Bring a row that `set_row` has just begun to where it was after choosing `token_ids`."""
        self._step[row] = len(token_ids)
        self._penalties.replay(row, self._host[row], token_ids)
        for token in token_ids:
            self.advance(row, token)

    def clear_row(self, row: int) -> None:
        """Make `row` idle: greedy, without a penalty."""
        self._write(row, _IDLE)
        self._penalties.write_bias(row, _IDLE)

    def row_state(self, row: int) -> SamplerRow:
        """Copy what decides the row's next tokens."""
        params = self._host[row]
        counts = self._penalties.save(row, params)
        return SamplerRow(
            params=params,
            step=self._step[row].clone(),
            counts=counts,
            matcher=self._matchers.copy(row),
            thought=copy(self._thoughts.get(row)),
        )

    def restore_row(self, row: int, state: SamplerRow) -> None:
        """Put a state taken by `row_state` into `row`, which may be another row than it came from."""
        self._write(row, state.params)
        self._step[row].copy_(state.step)
        self._penalties.restore(row, state.params, state.counts)
        self._matchers.put(row, state.matcher)
        if state.thought is not None:
            self._thoughts[row] = copy(state.thought)

    def move_row(self, src: int, dst: int) -> None:
        """Let the request in `src` go on in `dst`; `src` is idle afterwards."""
        if src != dst:
            self.restore_row(dst, self.row_state(src))
            self.clear_row(src)

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Choose one token id per row, int64 [B], from `logits` [B, V] of these distinct rows; advances their steps."""
        parts = [self._call(logits[part], rows[part]) for part in _parts(len(rows), self.form(rows))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def form(self, rows: Sequence[int]) -> Form | None:
        """Say in which form `choose` can choose for these rows; None when it cannot.

        It knows no grammar, no budget of reasoning, and nothing that changes logits.
        """
        if any(self.must_be_told(row) or _changes_logits(self._host[row]) for row in rows):
            return None
        return self._form(rows)

    def choose(self, logits: Tensor, form: Form, *, live: Tensor) -> Tensor:
        """Choose as a call does, for the first B rows, `logits` [B, V], whoever they are; nothing depends on the host.

        The steps of the rows that are not `live` [B] stay, and their ids have no meaning.
        """
        rows = len(logits)
        params = self._params.at(slice(rows))
        uniform = self._uniform(params, slice(rows), form)
        parts = [_choose(logits[part], params.at(part), uniform[part], form) for part in _parts(rows, form)]
        if form is not Form.GREEDY:
            self._step[:rows] += live
        return torch.cat(parts)

    def advance(self, row: int, token: int) -> None:
        """Tell `row`, on the host, which token came."""
        self._matchers.advance(row, token)
        if row in self._thoughts:
            self._thoughts[row].push(token)

    def must_be_told(self, row: int) -> bool:
        """Say whether the row's next token hangs on what `advance` tells."""
        thought = self._thoughts.get(row)
        return self._host[row].grammar is not None or (thought is not None and not thought.over)

    def failure(self, row: int) -> str | None:
        """Say why `row` cannot go on; None while it can."""
        return self._matchers.failure(row)

    def logprobs(
        self, logits: Tensor, rows: Sequence[int], tokens: Tensor, places: Sequence[int] | None = None
    ) -> Logprobs | None:
        """Start the way of log probabilities to the host, for the rows that ask for them; None when none does.

        They are the model's own, before any parameter changes them. Row i is at `places[i]` of `logits` and `tokens`,
        or at i.
        """
        asked = {index: self._host[row].logprobs for index, row in enumerate(rows)}
        wanted = {index: count for index, count in asked.items() if count is not None}
        if not wanted:
            return None
        at = to_device([index if places is None else places[index] for index in wanted], self.device)
        scores = logits[at].float().log_softmax(-1)  # [B', V]
        own = scores.gather(-1, tokens[at, None].clamp(min=0)).squeeze(-1)
        top = scores.topk(min(self.vocab_size, max(wanted.values())), dim=-1)
        return Logprobs(wanted, *(part.to("cpu", non_blocking=True) for part in (own, *top)))

    def _call(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        chosen, form = self._select(rows), self._form(rows)
        uniform = self._uniform(chosen.params, chosen.index, form)
        tokens = _choose(self._adjusted(logits, chosen), chosen.params, uniform, form)
        if form is not Form.GREEDY:
            self._step[chosen.index] += 1
        tokens = self._forced(tokens, chosen.rows)
        self._penalties.count(chosen.index, chosen.host, tokens)
        return tokens

    def _uniform(self, params: RowParams, at: Tensor | slice, form: Form) -> Tensor:
        """Return the random numbers of some rows' steps; greedy ones need none."""
        step = self._step[at]
        return step if form is Form.GREEDY else random_fraction(params.seed, step)

    def _form(self, rows: Sequence[int]) -> Form:
        return max(Form.of(self._host[row]) for row in rows)

    def _adjusted(self, logits: Tensor, chosen: _Selection) -> Tensor:
        params = chosen.params
        factors = (params.penalty, params.frequency, params.presence)
        scores = self._penalties.apply(logits.float(), chosen.index, chosen.host, factors)
        return self._matchers.mask(scores, chosen.rows)

    def _forced(self, tokens: Tensor, rows: Sequence[int]) -> Tensor:
        """Put what has to come in the place of what was drawn, and leave the steps of random numbers as they are."""
        thoughts = ((place, self._thoughts[row].forced) for place, row in enumerate(rows) if row in self._thoughts)
        forced = {place: token for place, token in thoughts if token is not None}
        if not forced:
            return tokens
        at = to_device(list(forced), self.device)
        return tokens.index_put((at,), to_device(list(forced.values()), self.device).where(tokens[at] >= 0, NO_TOKEN))

    def _select(self, rows: Sequence[int]) -> _Selection:
        key = tuple(rows)
        if key not in self._selections:
            index, host = to_device(rows, self.device), tuple(self._host[row] for row in rows)
            self._selections[key] = _Selection(rows=key, index=index, params=self._params.at(index), host=host)
        return self._selections[key]

    def _write(self, row: int, params: SamplingParams) -> None:
        self._host[row] = params
        self._params.write(row, params, self.vocab_size)
        self._matchers.put(row, None)
        self._thoughts.pop(row, None)
        self._selections.clear()


def _parts(rows: int, form: Form | None) -> list[slice]:
    """Split rows, as those that are chosen for at once take memory at once; only greedy ones take none."""
    most = rows if form is Form.GREEDY else SAMPLED_ROWS
    return [slice(first, min(first + most, rows)) for first in range(0, rows, most)]


def _choose(scores: Tensor, params: RowParams, uniform: Tensor, form: Form) -> Tensor:
    """Return one id per row [B] for adjusted `scores` [B, V]; `NO_TOKEN` where they are no numbers."""
    highest, tokens = scores.max(-1)  # NaN is higher than anything
    if form is not Form.GREEDY:
        weights = _weigh(scores.float() / params.temperature[:, None], params, form)
        tokens = torch.where(params.greedy, tokens, draw(weights, uniform))
    return torch.where(highest.isfinite(), tokens, NO_TOKEN)


def _weigh(scores: Tensor, params: RowParams, form: Form) -> Tensor:
    if form is Form.DRAWN:
        return weigh(scores, params.min_p)
    top_h = params.top_h if form is Form.ENTROPY else None
    return weigh_likeliest(scores, top_h=top_h, top_k=params.top_k, tail=params.tail, min_p=params.min_p)


def _changes_logits(params: SamplingParams) -> bool:
    return bool(params.logit_bias) or params.repetition_penalty != 1.0 or uses_output(params)
