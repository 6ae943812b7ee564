"""One batch through the model: its tensors, the forward, the next tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimkv_cli.cache.attention import LongRope, RetentionView, Step
from trimkv_cli.cache.releases import all_logits, forward_logits
from trimkv_cli.cache.retention_cache import RetentionCache
from trimkv_cli.cache.transfers import to_device
from trimkv_cli.engine.ahead import Ahead
from trimkv_cli.engine.graphs import Graphs
from trimkv_cli.engine.sampler import NO_TOKEN, Sampler
from trimkv_cli.engine.scheduler import Chunk, Decode, Prefill, Row
from trimkv_cli.model.pins import Pins, PromptSpan


class Decoder(Protocol):
    """Decode without the modules of transformers, over one cache and in place."""

    def step(
        self, ids: Tensor, position: Tensor, *, dense: bool, shown: Tensor | None = None, spans: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Feed a token to each of the first B rows; return logits `[B, V]` and log_beta `[L, B, Hkv]`."""

    def forget(self) -> None:
        """Let go of where slots lie, before they move."""


class ModelRunner:
    """Own the model, its cache and the sampler.

    With `decode_rows` every decode runs that many rows over all slots, whatever is in them: then a row's numbers do not
    depend on the rows beside it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: RetentionCache,
        sampler: Sampler,
        *,
        decode_rows: int | None = None,
        long_rope: LongRope | None = None,
        decoder: Decoder | None = None,
        pins: Pins | None = None,
        trace: Sequence[list[Tensor]] | None = None,
    ) -> None:
        self.cache = cache
        self.sampler = sampler
        self._model = model
        self.device = model.device
        self._decode_rows = decode_rows
        self._long_rope = long_rope
        self._decoder = decoder
        self._pins = pins or Pins()
        self.trace = trace
        self._ahead: Ahead | None = None
        self._long = False  # which factors of RoPE the last step ahead had
        self._graphs: Graphs | None = None

    def run_ahead(self, eos_token_ids: Collection[int]) -> None:
        """Decode one step ahead of the host from now on; on a GPU each step is two graphs."""
        how: dict[str, Any] = {"eos_token_ids": eos_token_ids, "graphed": self.device.type == "cuda"}
        self._ahead = Ahead(self._forward_static, self.sampler, self.cache, **how)
        self._graphs = self._ahead.graphs

    @property
    def no_graph(self) -> str | None:
        """Why some decodes on a GPU run without a graph, where they should have one."""
        return None if self._graphs is None else self._graphs.obstacle

    def close(self) -> None:
        """Let go of the graphs, and of what holds this runner in a circle: nothing runs any more."""
        if self._graphs is not None:
            self._graphs.forget()
        self._ahead = self._graphs = None

    def start(self, row: Row) -> None:
        """Prepare a row for its request: empty unless it continues an earlier one."""
        if row.base == 0:
            self.cache.clear(row.index)
        elif row.saved is None:
            row.saved = self.cache.save_row(row.index)  # a prefill cannot be undone, only begun again from here
        self.protect(row)
        self.sampler.set_row(row.index, row.request.params, (*row.history, *row.request.prompt_token_ids))

    def protect(self, row: Row) -> None:
        """Protect the ends of a row's newest prompt from now on, and no longer those of an earlier one."""
        if self._pins.prompt is not None:
            self.cache.protect(row.index, *self._pins.for_now(row.prompt, self.cache.kv_budget))

    def protected_by(self, prompt: PromptSpan) -> Tensor | None:
        """Return the protected intervals of a prompt, `[1, 2, 2]` in host memory."""
        if self._pins.prompt is None:
            return None
        return torch.tensor([self._pins.for_now(prompt, self.cache.kv_budget)], dtype=torch.int32)

    def pinned_beside(self, kv_budget: int, rows: Iterable[Row]) -> int:
        """Count what the ends of prompts may take in each head of some rows, beside what stays for good."""
        turns = any(row.prompt.start > 0 or row.request.keep for row in rows)
        return self._pins.beside(kv_budget, turns=turns)

    def pinned(self, row: Row) -> int:
        """Count the tokens of a row that `--pin` keeps in each head."""
        return self._pins.held(row.prompt, row.seen, self.cache.kv_budget)

    def restart(self, row: Row) -> None:
        """Make a row what it was before anything of its request was fed."""
        row.restart()
        if row.saved is not None:
            self.cache.load_row(row.index, row.saved, seen=row.base)
        self.start(row)

    def leave(self, row: Row) -> None:
        """Do nothing more for a row that has ended."""
        if self._ahead is not None:
            self._ahead.leave(row)

    def undo_decode(self, rows: Sequence[Row]) -> None:
        """Take back a decode of these rows, however far it came, and what the sampler took from it."""
        if self._ahead is not None:
            self._ahead.forget()
        positions = [-1] * (rows[-1].index + 1)
        for row in rows:
            positions[row.index] = row.seen
        self.cache.undo_decode(positions)
        for row in rows:
            self.sampler.set_row(row.index, row.request.params, (*row.history, *row.request.prompt_token_ids))
            self.sampler.replay(row.index, row.output)

    def resize(self, kv_budget: int, rows: Sequence[Row]) -> int:
        """Change the slots per head; return how many tokens of `rows` this evicts, over layers and heads."""
        if self._ahead is not None:
            self._ahead.undo_pending()
        if self._decoder is not None:
            self._decoder.forget()
        if self._graphs is not None:
            self._graphs.forget()  # they read the slots where they were
        if self._pins.prompt is not None:
            for row in rows:
                self.cache.protect(row.index, *self._pins.for_now(row.prompt, kv_budget))
        return self.cache.resize(kv_budget, [row.index for row in rows])

    def move(self, source: int, target: int) -> None:
        """Let the sequence in row `source` go on in row `target`."""
        self.cache.copy(source, target)
        if self.cache.spans is not None:
            self.cache.spans[target] = self.cache.spans[source]
        self.sampler.move_row(source, target)
        if self._ahead is not None:
            self._ahead.move(source, target)

    @torch.inference_mode()
    def run(self, batch: Prefill | Decode) -> list[tuple[Row, int]]:
        """Run one batch; return the next token of each row that has one, `NO_TOKEN` where it cannot be told."""
        return self._prefill(batch) if isinstance(batch, Prefill) else self._decode(batch)

    @torch.inference_mode()
    def read(self, chunk: Chunk) -> Tensor:
        """Feed one chunk alone, and return the logits `[T, V]` behind each of its tokens."""
        return self._feed(Prefill(chunks=(chunk,)), forward=all_logits)[0]

    def _prefill(self, batch: Prefill) -> list[tuple[Row, int]]:
        logits = self._feed(batch)
        return self._sample(
            logits,
            [(i, row) for i, chunk in enumerate(batch.chunks) if chunk.last for row in (chunk.row, *chunk.twins)],
        )

    def _feed(self, batch: Prefill, *, forward: Callable[..., Tensor] = forward_logits) -> Tensor:
        """Feed the chunks, and return what `forward` makes of them; count them and copy what others share."""
        for source, target in batch.copy_before:
            self.cache.copy(source, target)
        self._make_room((chunk.row, len(chunk.token_ids)) for chunk in batch.chunks)
        length = max(len(chunk.token_ids) for chunk in batch.chunks)
        # Padding stands on the left, so that the last column is every row's newest token; positions say what is
        # padding.
        ids = [[0] * (length - len(c.token_ids)) + list(c.token_ids) for c in batch.chunks]
        starts = [self.cache.seen[c.row.index] for c in batch.chunks]
        positions = [
            [-1] * (length - len(c.token_ids)) + list(range(start, start + len(c.token_ids)))
            for c, start in zip(batch.chunks, starts, strict=True)
        ]
        step = Step(
            positions=self._tensor(positions, torch.int32),
            rows=self._tensor([c.row.index for c in batch.chunks], torch.int64),
            longest=max(starts),
            shortest=min(starts),
            pinned=self._for_good(batch),
            spans=self._spans([c.row.index for c in batch.chunks]),
            lengths=tuple(len(chunk.token_ids) for chunk in batch.chunks),
        )
        fed = self._tensor(ids, torch.int64)
        self._rotate(long=batch.chunks[0].row.long_rope)
        logits = self._forward(fed, step, forward=forward)
        for chunk in batch.chunks:
            self.cache.seen[chunk.row.index] += len(chunk.token_ids)
            chunk.row.fed += len(chunk.token_ids)
        for source, target in batch.copy_after:
            self.cache.copy(source, target)
        for chunk in batch.chunks:
            self._copy_to_twins(chunk)
        return logits

    def _copy_to_twins(self, chunk: Chunk) -> None:
        for twin in chunk.twins:
            self.cache.copy(chunk.row.index, twin.index)
            twin.fed = twin.shared = chunk.row.fed

    def _for_good(self, batch: Prefill) -> Tensor | None:
        slots = self.cache.kv_budget
        counts = [self._pins.for_good(chunk.row.prompt, slots) for chunk in batch.chunks]
        return self._tensor(counts, torch.int32) if any(counts) else None

    def _spans(self, rows: slice | Sequence[int]) -> Tensor | None:
        """Return the protected intervals of some rows, as a view of neighbours."""
        spans = self.cache.spans
        if spans is None:
            return None
        return spans[rows] if isinstance(rows, slice) else spans[self._tensor(rows, torch.int64)]

    def _decode(self, batch: Decode) -> list[tuple[Row, int]]:
        self._make_room((row, 1) for row in batch.rows)
        if self._ahead is not None:
            if self.trace is None:
                return self._decode_ahead(self._ahead, batch.rows)
            self._ahead.undo_pending()
        count = self._decode_rows or batch.rows[-1].index + 1
        ids, positions = [0] * count, [-1] * count
        for row in batch.rows:
            ids[row.index], positions[row.index] = row.output[-1], row.seen
        seen = [row.seen for row in batch.rows]
        held = min(self.cache.held(row.index) for row in batch.rows)
        position = self._tensor(positions, torch.int32)
        spans = self._spans(slice(count))
        self._rotate(long=batch.rows[0].long_rope)
        if self._decoder is not None:
            dense = held >= self.cache.kv_budget
            fed = self._tensor(ids, torch.int64)
            how: dict[str, Any] = {"dense": dense, "shown": self._shown(position), "spans": spans}
            logits, log_beta = self._decoder.step(fed, position, **how)
            for layer, traced in enumerate(self.trace or ()):
                traced.append(log_beta[layer, :, :, None])
        else:
            longest = sys.maxsize if self._decode_rows else max(seen)
            step = Step(positions=position[:, None], rows=None, longest=longest, shortest=held, spans=spans)
            logits = self._forward(self._tensor(ids, torch.int64)[:, None], step)
        for row in batch.rows:
            self.cache.seen[row.index] += 1
        return self._sample(logits, [(row.index, row) for row in batch.rows])

    def _decode_ahead(self, ahead: Ahead, rows: Sequence[Row]) -> list[tuple[Row, int]]:
        """Decode by what runs ahead, or in step where the host has to change the next step before it begins."""
        turns, self._long = rows[0].long_rope is not self._long, rows[0].long_rope
        self._rotate(long=self._long)
        ready = ahead.step(rows, in_step=turns or self._is_full(rows))
        for row, _ in ready:
            self.cache.seen[row.index] = row.seen + 1
        return ready

    def _forward(self, ids: Tensor, step: Step, *, forward: Callable[..., Tensor] = forward_logits) -> Tensor:
        """Return the logits, `[B, V]` of the last column unless `forward` returns others."""
        positions = step.positions
        return forward(
            self._model,
            ids,
            RetentionView(self.cache, step, self.trace),
            position_ids=self._model_positions(step),
            attention_mask=positions[:, None, None],  # 4D: transformers makes no mask of its own
        )

    def _forward_static(self, ids: Tensor, position: Tensor, count: int) -> Tensor:
        """Decode the first `count` rows over all their slots, whatever is in them, reading nothing on the host."""
        spans = self._spans(slice(count))  # a view: a graph reads what they are then
        if self._decoder is not None:
            fed, position = ids[:count], position[:count]
            return self._decoder.step(fed, position, dense=False, shown=self._shown(position), spans=spans)[0]
        step = Step(positions=position[:count, None], rows=None, longest=sys.maxsize, shortest=0, spans=spans)
        return self._forward(ids[:count, None], step)

    def _rotate(self, *, long: bool) -> None:
        if self._long_rope is not None:
            self._long_rope.use(long=long)

    def _make_room(self, fed: Iterable[tuple[Row, int]]) -> None:
        """Give what rows keep new positions where the next tokens would pass the model's."""
        if self.cache.rebase is not None:
            for row, tokens in fed:
                self.cache.rebase.make_room(row.index, seen=self.cache.seen[row.index], tokens=tokens)

    def _is_full(self, rows: Sequence[Row]) -> bool:
        """Say whether rows get new positions before the step after the next: that is decided on the host."""
        rebase = self.cache.rebase
        return rebase is not None and any(rebase.is_full(row.index, seen=row.seen, tokens=2) for row in rows)

    def _model_positions(self, step: Step) -> Tensor:
        """Return the positions `[B, T]` that the model sees."""
        positions = step.positions.clamp(min=0).long()
        return positions if self.cache.rebase is None else self.cache.rebase.model_positions(positions, step.rows)

    def _shown(self, position: Tensor) -> Tensor | None:
        """Return the positions `[B]` that the model sees in a decode, when they are others."""
        rebase = self.cache.rebase
        return None if rebase is None else rebase.model_positions(position[:, None], None)[:, 0]

    def _sample(self, logits: Tensor, places: Sequence[tuple[int, Row]]) -> list[tuple[Row, int]]:
        """Sample the rows of the batch that have a next token, each from its place in `logits`."""
        if not places:
            return []
        if [place for place, _ in places] != list(range(len(logits))):
            logits = logits[self._tensor([place for place, _ in places], torch.int64)]
        rows = [row for _, row in places]
        tokens = self.sampler(logits, [row.index for row in rows])
        scored = self.sampler.logprobs(logits, [row.index for row in rows], tokens)
        chosen: list[int] = tokens.tolist()
        logprobs = {} if scored is None else scored.read()
        for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            if token != NO_TOKEN:
                self.sampler.advance(row.index, token)
            row.logprob = logprobs.get(place)
        return list(zip(rows, chosen, strict=True))

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return to_device(values, self.device, dtype)
