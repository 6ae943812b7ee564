"""A caller's request to the engine: token ids, sampling parameters, nothing about memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from trimkv_cli.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Say how one request's tokens are chosen; the defaults sample from the plain distribution.

    Raises:
        UsageError: a value outside its range, by name.
    """

    max_tokens: int = 512
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    top_h: float | None = None
    repetition_penalty: float = 1.0  # of tokens in prompt and output
    presence_penalty: float = 0.0  # of tokens in the output
    frequency_penalty: float = 0.0  # of tokens in the output, times how often
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit)
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    think_budget: int | None = None  # tokens of reasoning before it is closed; a grammar leaves no room for any
    grammar: str | None = None  # in llguidance's form; the answer follows it
    logprobs: int | None = None  # report each token's log probability, and this many of the likeliest ones

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": self.max_tokens >= 1,
            "temperature": 0.0 <= self.temperature < float("inf"),
            "top_p": 0.0 < self.top_p <= 1.0,
            "top_k": self.top_k >= 0,
            "min_p": 0.0 <= self.min_p <= 1.0,
            "top_h": self.top_h is None or 0.0 < self.top_h <= 1.0,
            "repetition_penalty": 0.0 < self.repetition_penalty < float("inf"),
            "presence_penalty": -2.0 <= self.presence_penalty <= 2.0,
            "frequency_penalty": -2.0 <= self.frequency_penalty <= 2.0,
            "logit_bias": all(-100.0 <= bias <= 100.0 for _, bias in self.logit_bias),
            "logprobs": self.logprobs is None or 0 <= self.logprobs <= 20,
            "think_budget": self.think_budget is None or self.think_budget >= 0,
            "seed": 0 <= self.seed < 2**63,
            "stop": all(self.stop),
        }
        for name, good in checks.items():
            if not good:
                message = f"{name} = {getattr(self, name)!r} is out of range"
                raise UsageError(message, hint=f"{name}: {_RANGES[name]}", param=name)
        if self.grammar is not None and self.ignore_eos:
            raise UsageError(
                "a format ends where it is complete: it cannot go with ignore_eos",
                hint="leave one of the two out",
                param="response_format",
            )

    def check_vocabulary(self, size: int) -> None:
        """Raise when a bias is for a token that the model does not have.

        Raises:
            UsageError: naming the token.
        """
        _check_ids((token for token, _ in self.logit_bias), size, "logit_bias: ", "logit_bias")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def may_think_too_long(self) -> bool:
        """Say whether the budget of reasoning can ever be spent."""
        return self.think_budget is not None and self.think_budget < self.max_tokens and self.grammar is None


def check_token_ids(token_ids: Iterable[int], vocab_size: int) -> None:
    """Raise when the model does not have one of a prompt's tokens.

    Raises:
        UsageError: naming it.
    """
    _check_ids(token_ids, vocab_size, "", None)


def _check_ids(token_ids: Iterable[int], size: int, where: str, param: str | None) -> None:
    bad = next((token for token in token_ids if not 0 <= token < size), None)
    if bad is not None:
        message = f"{where}token id {bad} is outside the vocabulary of {size}"
        raise UsageError(message, hint=f"ids go from 0 to {size - 1}", param=param)


_RANGES = {
    "max_tokens": "1 or more",
    "temperature": "0 (greedy) or more",
    "top_p": "above 0, at most 1",
    "top_k": "0 (off) or more",
    "min_p": "between 0 and 1",
    "top_h": "above 0, at most 1",
    "repetition_penalty": "above 0 (1 = off)",
    "presence_penalty": "between -2 and 2 (0 = off)",
    "frequency_penalty": "between -2 and 2 (0 = off)",
    "logit_bias": "between -100 and 100 for each token",
    "logprobs": "0 to 20 of the likeliest tokens",
    "think_budget": "0 (no reasoning) or more",
    "seed": "0 to 2^63 − 1",
    "stop": "strings that are not empty",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt and how to continue it.

    `prefix_len` is where the system message ends in `prompt_token_ids` (0 = no such boundary): a chunk ends there, and
    requests with the same prefix share its prefill. `document_len` is a later such boundary: where a text ends that
    several requests ask about. With `keep` the row stays after the last token, for a later request
    that names this one in `continues`: that one feeds only what is new, beginning with this one's last output token.
    Requests of one `same_prompt` group have the same prompt: those that get their rows in time share its whole prefill.
    With `goes_on` it goes on reading or answering that one's prompt, whose ends stay pinned.
    `shown` are special tokens that count as text of the answer.
    `context` is how long the sequence may become over all its turns (0 = this request alone).
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    prefix_len: int = 0
    document_len: int = 0
    same_prompt: str | None = None
    keep: bool = False
    continues: str | None = None
    goes_on: bool = False
    context: int = 0
    shown: tuple[int, ...] = ()

    @property
    def shared_len(self) -> int:
        """How many prompt tokens other requests may share."""
        return max(self.prefix_len, self.document_len)

    def fitted(self, room: int, *, least: int = 1) -> Request:
        """Return a request whose answer takes no more than the `room` that is left, where that is `least` tokens."""
        if not least <= room < self.params.max_tokens:
            return self
        return replace(self, params=replace(self.params, max_tokens=room))
