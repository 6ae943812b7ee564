"""The built-in model in a small cache, and conversations with it, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimkv_cli.chat.conversation import Conversation
from trimkv_cli.chat.turns import Turn
from trimkv_cli.loading.loader import load_engine
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.request import SamplingParams

SAMPLED = SamplingParams(max_tokens=24, temperature=1.5, seed=11, repetition_penalty=1.1)
LONG = "My cat is called Zubo. " * 20


def load(**options: Any) -> Any:
    """Load mini with one row, few slots and small chunks."""
    return load_engine(
        EngineOptions(**{"kv_budget": "40", "prefill_chunk": 32, "max_inflight": 1, "threads": 1} | options)
    )


def begin(llm: Any, **changes: Any) -> Conversation:
    """Begin a conversation; its row is free again after `clear()`."""
    values: dict[str, Any] = {"system": None, "think": None, "params": SAMPLED, "undo_depth": 3} | changes
    return Conversation(llm, **values)


def never() -> bool:
    return False


def after(steps: int) -> Callable[[], bool]:
    """Ask to stop once `steps` steps have been run."""
    asked = iter(range(steps + 1))
    return lambda: next(asked, steps) >= steps


def say(conversation: Conversation, text: str, stopped: Callable[[], bool] = never, **more: Any) -> Turn:
    """Say something, keep the state after it, and return the turn."""
    for _ in conversation.say(text, stopped, **more):
        pass
    conversation.save_state()
    return conversation.turns[-1]


def go_on(conversation: Conversation) -> Turn:
    """Go on with the last answer."""
    for _ in conversation.go_on(never):
        pass
    conversation.save_state()
    return conversation.turns[-1]
