"""A conversation: what has been said lives in one row of the cache, and only what is new is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trimkv_cli.chat.snapshots import Snapshots
from trimkv_cli.chat.talk import Asked, Held, Steps
from trimkv_cli.chat.turns import Turn, seed_of, take_back, to_messages
from trimkv_cli.errors import CacheMismatch, InputError, TrimkvError, UnsupportedModel, UsageError
from trimkv_cli.events import Answer, RequestStats, TokenEvent
from trimkv_cli.request import Request, SamplingParams

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine
    from trimkv_cli.engine.row_files import RowState
    from trimkv_cli.engine.text import Detokenizer, Text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A turn on its way; `before` is the part of it that an earlier request made, `fed` what the row had seen."""

    user: str
    attempt: int
    first: int
    fed: int
    before: Turn | None = None


class Conversation:
    """Own the turns, the row that holds them, and the states to which it can go back.

    The row is None before the first message, and where turns have to be read again because no state of theirs is left.
    """

    def __init__(
        self,
        llm: Engine,
        *,
        system: str | None,
        think: bool | None,
        params: SamplingParams,
        undo_depth: int,
        fits_rest: bool = False,
    ) -> None:
        self.llm = llm
        self.system = system
        self.think = think
        self.params = params
        self.fits_rest = fits_rest  # near the end of the positions answers may be shorter than max_tokens
        self.turns: list[Turn] = []
        self.snapshots = Snapshots(undo_depth, model_id=llm.facts.model_id, fingerprint=llm.fingerprint)
        self.why_lost: str | None = None  # why the state after the last turn could not be read, where there was one
        self._row: str | None = None
        self._last_token: int | None = None
        self._ids = 0
        self._to_read = self._read_before = 0
        self._stats: dict[int, RequestStats] = {}  # turns behind it → what the last of them cost

    @property
    def model_id(self) -> str:
        return self.llm.facts.model_id

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return self.llm.fingerprint

    @property
    def facts(self) -> Mapping[str, str]:
        """Say in words what answers."""
        facts = self.llm.facts
        return {
            "model": facts.model_id,
            "gates": facts.gate.id,
            "kv_budget": f"{facts.plan.run.kv_budget} slots per head",
            "positions": f"{facts.max_positions:,}",
        }

    @property
    def row(self) -> str | None:
        """Name what the engine keeps of this conversation: `llm.kept.retained(row)` and its like."""
        return self._row

    @property
    def last_stats(self) -> RequestStats | None:
        """Return what the last turn cost; None for one of an earlier run."""
        return self._stats.get(len(self.turns))

    @property
    def must_reread(self) -> bool:
        """Say whether the next message makes the model read the earlier turns again."""
        return self._row is None and bool(self.turns)

    @property
    def seen(self) -> int:
        return self.llm.kept.seen(self._row) if self._row is not None else 0

    @property
    def held(self) -> Held:
        """Say what the row holds, and what memory the process takes."""
        llm, row = self.llm, self._row
        return Held(
            kept=llm.kept.per_head(row) if row is not None else 0,
            seen=self.seen,
            slots=llm.facts.plan.run.kv_budget,
            horizon=llm.kept.horizon(row)[0] if row is not None else None,
            budget_bytes=llm.facts.plan.budget_bytes,
            peak_bytes=llm.peak_bytes,
        )

    @property
    def slow(self) -> bool:
        return self.llm.facts.plan.run.device == "cpu"

    @property
    def progress(self) -> tuple[int, int] | None:
        """Count the tokens that the running turn has read, and those it has to read."""
        return self.llm.stats.prefill_tokens - self._read_before, self._to_read

    @property
    def starts_in_thought(self) -> bool:
        """Say whether the template opens `<think>` itself, so that answers begin inside of it."""
        return starts_in_thought(self.llm.text, think=self.think)

    def say(self, user: str, stopped: Asked, *, attempt: int = 0) -> Steps:
        """Run one turn, step by step; it ends early, with what there is of an answer, once `stopped()` is true.

        Raises:
            ContextOverflow: the positions end; nothing has changed.
        """
        ids, prefix_len = self._render(user)
        params = replace(self.params, seed=seed_of(self.params.seed, len(self.turns) + 1, attempt))
        request = self._request(ids, params, prefix_len=prefix_len)
        self.llm.check(request)
        return self._run(request, _Begun(user=user, attempt=attempt, first=self.seen, fed=self.seen), stopped)

    def go_on(self, stopped: Asked) -> Steps:
        """Go on with the last answer where it was cut; raises UsageError where it ended by itself."""
        if not self.turns or self._row is None:
            raise UsageError("there is no answer to go on with", hint="send a message first, or /regen")
        turn = self.turns[-1]
        if turn.finish_reason == "stop":
            raise UsageError("the answer had come to its end", hint="/regen asks for another one")
        unread, last = self.llm.kept.unread(self._row), self._last_token
        if unread:
            self._put_back(replace(self.llm.kept.save(self._row), unread=()))
        ids = (*unread, *(() if last is None else (last,)))
        seed = seed_of(self.params.seed, len(self.turns), turn.attempt) + len(turn.token_ids)
        request = self._request(ids, replace(self.params, seed=seed % 2**63), goes_on=True)
        self.llm.check(request)
        begun = _Begun(user=turn.user, attempt=turn.attempt, first=turn.first, fed=self.seen, before=turn)
        self.turns = self.turns[:-1]
        return self._run(request, begun, stopped)

    def undo(self, count: int = 1) -> list[Turn]:
        """Take back the last turns and return them; where no state is left the next message reads what remains again.

        Raises:
            UsageError: there are not that many.
        """
        self.turns, gone = take_back(self.turns, count)
        self.go_to_state()
        return gone

    def redo(self, turns: Sequence[Turn]) -> None:
        """Put back what `undo` returned, as long as nothing was said since."""
        self.turns += turns
        self.go_to_state()

    def clear(self) -> None:
        """Begin anew, with the same system message."""
        self._let_go()
        self.snapshots.clear()
        self.turns, self._stats, self.why_lost = [], {}, None

    def load(self, turns: Sequence[Turn]) -> None:
        """Take over other turns, whose states `snapshots` holds already."""
        self.turns, self._stats = list(turns), {}
        self.go_to_state()

    def go_to_state(self) -> None:
        """Put the state after the last turn into the row; without one the next message reads the turns again.

        So it does where the state's file is damaged or another engine's; `why_lost` says which.
        """
        self._let_go()
        self.why_lost = None
        if not self.turns:
            return
        try:
            state = self.snapshots.get(len(self.turns))
        except (CacheMismatch, InputError) as error:
            self.snapshots.drop(len(self.turns))
            self.why_lost = error.message
            return
        if state is not None:
            self._put_back(state)

    def read_again(self) -> None:
        """Let the next message read all turns again, under the system message as it is then."""
        self._let_go()
        self.snapshots.clear()

    def pin(self, positions: Iterable[int]) -> None:
        """Keep tokens for good where heads still hold them; raises UsageError where too few slots would be left."""
        assert self._row is not None, "nothing has been said"
        self.llm.kept.pin(self._row, positions)

    def save_state(self) -> None:
        """Keep the state after the last turn."""
        if self._row is not None:
            self.snapshots.put(len(self.turns), self.llm.kept.save(self._row))

    def _render(self, user: str) -> tuple[tuple[int, ...], int]:
        text = need_chat(self.llm.text)
        if self._row is None:
            prompt = text.render_chat(
                [*to_messages(self.system, self.turns), {"role": "user", "content": user}], think=self.think
            )
            return prompt.token_ids, prompt.prefix_len
        ids = text.render_turn(
            user, last_token_id=self._last_token, eos_token_ids=self.llm.facts.eos_token_ids, think=self.think
        )
        return tuple(ids), 0

    def _request(
        self, ids: tuple[int, ...], params: SamplingParams, *, prefix_len: int = 0, goes_on: bool = False
    ) -> Request:
        self._ids += 1
        request = Request(
            id=f"turn-{self._ids}",
            prompt_token_ids=ids,
            prefix_len=prefix_len,
            params=params,
            keep=True,
            continues=self._row,
            goes_on=goes_on,
            context=self.llm.facts.max_positions,
        )
        return request.fitted(self.llm.room(request)) if self.fits_rest else request

    def _run(self, request: Request, begun: _Begun, stopped: Asked) -> Steps:
        answer, decoder = Answer(request), self._decoder_after(begun.before, request)
        self._to_read, self._read_before = len(request.prompt_token_ids), self.llm.stats.prefill_tokens
        read_again = self.must_reread
        self.llm.add(request)
        self._row = request.id
        try:
            while self.llm.has_work:
                ended = self.llm.stop(request.id) if stopped() else None
                events = [ended] if ended is not None else self.llm.step()
                if decoder is not None:
                    events = [_decoded(event, decoder) for event in events]
                for event in events:
                    if event.fault is not None and event.error_code == "not_finite":
                        raise event.fault  # what the row holds is of no use either
                    answer.take(event)
                yield events
        except TrimkvError:
            self.llm.abort(request.id)
            if begun.before is not None:
                self.turns.append(begun.before)
            self.go_to_state()
            raise
        if read_again:  # the earlier turns stand in this one's prompt now
            self.turns = [replace(turn, first=0, prompt_tokens=0, seen=0) for turn in self.turns]
        self._end(begun, answer)

    def _decoder_after(self, before: Turn | None, request: Request) -> Detokenizer | None:
        """Go on decoding where an answer was cut: some tokenizers drop the space before a text's first word."""
        if before is None:
            return None
        decoder = need_chat(self.llm.text).detokenizer(request.params.stop)
        for token_id in before.token_ids:
            decoder.push(token_id)
        return decoder

    def _end(self, begun: _Begun, answer: Answer) -> None:
        stats, before = answer.stats, begun.before
        self._last_token = answer.token_ids[-1] if answer.token_ids else None
        read = stats.prompt_tokens + begun.fed - begun.first
        self.turns.append(
            Turn(
                user=begun.user,
                answer=answer.text if before is None else before.answer + answer.text,
                token_ids=(*(() if before is None else before.token_ids), *answer.token_ids),
                finish_reason=answer.finish_reason or "abort",
                attempt=begun.attempt,
                first=begun.first,
                prompt_tokens=before.prompt_tokens if before is not None and before.token_ids else read,
                seen=stats.cache.seen_tokens,
            )
        )
        self._stats[len(self.turns)] = stats

    def _put_back(self, state: RowState) -> None:
        self._let_go()
        self._ids += 1
        self._row = f"state-{self._ids}"
        self.llm.kept.restore(state, self._row)
        self._last_token = state.last_token

    def _let_go(self) -> None:
        if self._row is not None:
            self.llm.kept.release(self._row)
        self._row, self._last_token = None, None


def need_chat(text: Text | None) -> Text:
    """Return the tokenizer of a model that can chat.

    Raises:
        UnsupportedModel: it has none, or no chat template.
    """
    if text is None:
        raise UnsupportedModel(
            "the model has no tokenizer, so it cannot chat", hint='trimkv run, with lines of "prompt_token_ids"'
        )
    if not text.template:
        raise UnsupportedModel("the model has no chat template, so it cannot chat", hint="trimkv ask --raw")
    return text


def starts_in_thought(text: Text | None, *, think: bool | None) -> bool:
    """Say whether a template opens `<think>` itself."""
    if text is None or not text.template:
        return False
    prompt = text.render_chat([{"role": "user", "content": "a"}], think=think).token_ids
    return str(text.tokenizer.decode(list(prompt[-8:]))).rstrip().endswith("<think>")


def _decoded(event: TokenEvent, decoder: Detokenizer) -> TokenEvent:
    text = "".join(map(decoder.push, event.token_ids))
    return replace(event, text=text + decoder.finish() if event.finish_reason is not None else text)
