"""Perplexity of a long text under a policy: every token is read, none is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from trimkv_cli.engine.engine import Engine
from trimkv_cli.engine.text import Text
from trimkv_cli.errors import InputError
from trimkv_cli.eval.scoring import bootstrap
from trimkv_cli.eval.texts import RealText
from trimkv_cli.request import Request, SamplingParams

_BLOCK = 128  # tokens that are drawn together: neighbours are alike


def draw_text(real: RealText, text: Text, *, tokens: int, seed: int) -> Request:
    """Return the first `tokens` tokens of the text from a place that the seed chooses.

    Raises:
        InputError: the text is shorter.
    """
    ids = text.encode(real.text)
    spare = len(ids) - tokens
    if spare < 0:
        raise InputError(
            f"the text has {len(ids):,} tokens, and {tokens:,} are to be read",
            hint="--text FILE with more, or a smaller --context",
        )
    start = Random(f"trimkv eval ppl {seed}").randrange(spare + 1) if seed else 0  # noqa: S311
    return Request(id="ppl", prompt_token_ids=tuple(ids[start : start + tokens]), params=SamplingParams(max_tokens=1))


def nats(engine: Engine, request: Request) -> list[float]:
    """Return the nats that each token but the first takes."""
    return [-value for value in engine.log_likelihoods(request)]


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean when blocks of neighbours are drawn again; a single block has none."""
    return bootstrap(values, [str(number // _BLOCK) for number in range(len(values))])
