"""Writes log probabilities of tokens in the two forms that OpenAI's API has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from trimkv_cli.events import TokenLogprob

_LOWEST = -9999.0  # how OpenAI's API writes the logarithm of nothing: JSON has no infinity
_NO_CHARACTER = "\ufffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedLogprob:
    """A token's text and log probability, and those of the likeliest tokens of its step."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


def name_tokens(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprob], text_of: Callable[[int], str]
) -> list[NamedLogprob]:
    """Put texts in the place of ids."""
    return [
        NamedLogprob(
            token=text_of(token_id),
            logprob=max(said.logprob, _LOWEST),
            top=tuple((text_of(other), max(logprob, _LOWEST)) for other, logprob in said.top),
        )
        for token_id, said in zip(token_ids, logprobs, strict=True)
    ]


def chat_logprobs(tokens: Sequence[NamedLogprob]) -> dict[str, Any]:
    """Return `choices[].logprobs` of a chat completion."""
    content = [
        {**_entry(token.token, token.logprob), "top_logprobs": [_entry(*other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[NamedLogprob]) -> dict[str, Any]:
    """Return `choices[].logprobs` of a text completion; of tokens with the same text the likeliest counts."""
    texts = [token.token for token in tokens]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [dict(reversed(token.top)) for token in tokens],
        "text_offset": [0, *accumulate(map(len, texts))][: len(texts)],
    }


def _entry(token: str, logprob: float) -> dict[str, Any]:
    raw = None if _NO_CHARACTER in token else list(token.encode("utf-8", "surrogatepass"))
    return {"token": token, "logprob": logprob, "bytes": raw}
