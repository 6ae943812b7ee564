"""A conversation that runs at a server: whole histories are sent, and it goes on from the row that it kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from trimkv_cli.chat.snapshots import Snapshots
from trimkv_cli.chat.talk import Asked, Held, Steps
from trimkv_cli.chat.turns import THINKS, Turn, seed_of, take_back, to_messages
from trimkv_cli.commands.warm import Said, Server, request_body, unsaid
from trimkv_cli.errors import UsageError
from trimkv_cli.events import CacheStats, FinishReason, RequestStats, TokenEvent
from trimkv_cli.request import SamplingParams

_PATH = "/v1/chat/completions"


class RemoteConversation:
    """Own the turns; the server owns the row, and may forget it."""

    def __init__(
        self, server: Server, *, system: str | None, think: bool | None, params: SamplingParams, fits_rest: bool
    ) -> None:
        self.server = server
        self.system = system
        fixed = server.about.fixed
        self.think = fixed.get("think") if think is None else think
        self.params = replace(params, **{name: fixed[name] for name in unsaid(params, fixed)})
        self.fits_rest = fits_rest
        self.turns: list[Turn] = []
        self.snapshots = Snapshots(0, model_id=server.about.model, fingerprint={})  # it never gets a state
        self.extra: Mapping[str, Any] = {}  # what the server said with the last answer, also of its memory
        self._held: object = None  # what its row holds; None = not known
        self._stats: dict[int, RequestStats] = {}  # turns behind it → what the last of them cost

    @property
    def model_id(self) -> str:
        return self.server.about.model

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return {}

    @property
    def facts(self) -> Mapping[str, str]:
        about = self.server.about
        return {
            "model": about.model,
            "gates": str(about.gates.get("id")),
            "kv_budget": f"{about.resolved.get('kv_budget')} slots per head",
            "server": self.server.url,
        }

    @property
    def held(self) -> Held:
        stats, about = self.last_stats, self.server.about
        return Held(
            kept=stats.cache.kept_per_head if stats is not None else 0,
            seen=stats.cache.seen_tokens if stats is not None else 0,
            slots=int(about.resolved.get("kv_budget") or 0),
            horizon=None,
            budget_bytes=about.budget_bytes,
            peak_bytes=(self.extra.get("memory") or {}).get("peak_bytes", 0),
        )

    @property
    def slow(self) -> bool:
        return self.server.about.resolved.get("device") == "cpu"

    @property
    def progress(self) -> None:
        return None

    @property
    def why_lost(self) -> None:
        return None

    @property
    def last_stats(self) -> RequestStats | None:
        return self._stats.get(len(self.turns))

    @property
    def must_reread(self) -> bool:
        return bool(self.turns) and self._held not in (None, self._state())

    @property
    def starts_in_thought(self) -> bool:
        return self.server.about.in_thought.get(THINKS[self.think], False)

    def say(self, user: str, stopped: Asked, *, attempt: int = 0) -> Steps:
        """Run one turn at the server; it ends early, with what there is of an answer, once `stopped()` is true.

        Raises:
            UsageError: the server was started with something that a request cannot take back.
        """
        self._check_fixed()
        params = replace(self.params, seed=seed_of(self.params.seed, len(self.turns) + 1, attempt))
        messages = [*to_messages(self.system, self.turns), {"role": "user", "content": user}]
        return self._run(messages, params, attempt, stopped)

    def go_on(self, _: Asked) -> Steps:
        """Refuse: a request cannot go on with an answer."""
        raise UsageError("/continue needs --server off: a server ends an answer once", hint="/regen asks for another")

    def undo(self, count: int = 1) -> list[Turn]:
        """Take back the last turns and return them; raises UsageError where there are not that many."""
        self.turns, gone = take_back(self.turns, count)
        return gone

    def redo(self, turns: Sequence[Turn]) -> None:
        self.turns += turns

    def clear(self) -> None:
        self.turns, self._stats, self._held = [], {}, None

    def load(self, turns: Sequence[Turn]) -> None:
        self.turns, self._stats, self._held = list(turns), {}, None

    def read_again(self) -> None:
        """Nothing needs to be done: the server reads what it does not hold."""

    def save_state(self) -> None:
        """Nothing can be done: the state is the server's."""

    def _run(self, messages: list[dict[str, str]], params: SamplingParams, attempt: int, stopped: Asked) -> Steps:
        said = Said(self.server.url, self.server.about, params)
        default = SamplingParams(**self.server.about.defaults).max_tokens
        says_most = not self.fits_rest or params.max_tokens != default
        body = {**request_body(params, max_tokens=says_most, think=self.think), "messages": messages}
        token_ids: list[int] = []
        self._held = None
        for chunk in self.server.client().listen(_PATH, {**body, "return_token_ids": True}, stopped):
            if chunk is None:
                yield ()
                continue
            text = said.take(chunk)
            new = tuple(token for choice in chunk.get("choices", ()) for token in choice.get("token_ids") or ())
            token_ids += new
            yield (TokenEvent(request_id="turn", token_ids=new, text=text),)
        turn = Turn(
            user=messages[-1]["content"],
            answer=said.text,
            token_ids=tuple(token_ids),
            finish_reason=cast("FinishReason", said.finish_reason or "abort"),
            attempt=attempt,
        )
        self._end(turn, said)

    def _end(self, turn: Turn, said: Said) -> None:
        if not said.usage:  # it was stopped: the server has let the row go
            self.turns.append(turn)
            self._held = ()
            return
        stats = _stats(said)
        before = self.turns[-1].seen if self.turns else 0
        if not 0 < before <= stats.continued_tokens:  # all stands in this turn's prompt now
            self.turns = [replace(each, first=0, prompt_tokens=0, seen=0) for each in self.turns]
            stats = replace(stats, prompt_tokens=stats.prompt_tokens + stats.continued_tokens, continued_tokens=0)
        self.turns.append(
            replace(turn, first=stats.continued_tokens, prompt_tokens=stats.prompt_tokens, seen=stats.cache.seen_tokens)
        )
        self.extra = said.extra
        self._stats[len(self.turns)] = stats
        self._held = self._state()

    def _state(self) -> object:
        return self.system, self.think, tuple((turn.user, turn.answer, turn.attempt) for turn in self.turns)

    def _check_fixed(self) -> None:
        fixed = self.server.about.fixed
        for name in (*unsaid(self.params, fixed), *(["think"] if self.think is None and "think" in fixed else [])):
            value = THINKS[fixed[name]] if name == "think" else fixed[name]
            raise UsageError(
                f"the server was started with {name} {value}, and no request takes that back",
                hint=f"/set {name} {value}, or --server off",
            )


def _stats(said: Said) -> RequestStats:
    usage, timing = said.usage, said.extra.get("timing", {})
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return RequestStats(
        prompt_tokens=usage["prompt_tokens"] - cached,
        completion_tokens=usage["completion_tokens"],
        shared_prefix_tokens=0,
        queue_s=timing.get("queue_s", 0.0),
        ttft_s=timing.get("ttft_s"),
        total_s=timing.get("total_s", 0.0),
        cache=CacheStats(**said.extra["cache"]),
        continued_tokens=cached,
    )
