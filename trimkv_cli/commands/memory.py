"""What an engine's cache holds, gathered for the pictures of `inspect` and `chat`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trimkv_cli.events import MemoryUse

if TYPE_CHECKING:
    from trimkv_cli.engine.engine import Engine


def memory_use(engine: Engine, *, seen: int) -> MemoryUse:
    """Return the bytes of an engine's parts, and what a sequence of `seen` tokens would take in a full cache."""
    facts = engine.facts
    return MemoryUse(
        weights_bytes=facts.weight_bytes,
        gate_bytes=facts.gate_bytes,
        kv_bytes=engine.kv_bytes,
        workspace_bytes=facts.plan.workspace_bytes,
        peak_bytes=engine.peak_bytes,
        budget_bytes=facts.plan.budget_bytes,
        seen_tokens=seen,
        full_cache_bytes=facts.plan.full_cache_bytes(seen),
    )


def pieces_of(engine: Engine, token_ids: Sequence[int]) -> list[str]:
    """Return what each token says, or its id in brackets where the model has no tokenizer."""
    from trimkv_cli.engine.detokenizer import token_pieces

    if engine.text is None:
        return [f"[{token_id}]" for token_id in token_ids]
    return token_pieces(engine.text.tokenizer, token_ids)
