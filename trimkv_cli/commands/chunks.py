"""An answer as JSON lines while it comes: OpenAI's chat.completion.chunk objects, the last with usage and `trimkv`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from trimkv_cli.ui.plain import to_json


class ChunkWriter:
    """Write one object a line through `write`: a piece of text each, then the end of the answer."""

    def __init__(self, write: Callable[[str], None], *, request_id: str, model: str) -> None:
        self._write = write
        self._head = {
            "id": f"chatcmpl-{request_id}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._first = True

    def push(self, piece: str) -> None:
        """Write a piece of the answer."""
        delta = {"role": "assistant", "content": piece} if self._first else {"content": piece}
        self._first = False
        self._line({"choices": [_choice(delta, None)]})

    def end(self, completion: dict[str, Any]) -> None:
        """Write what a chat.completion holds beside its text."""
        reason = completion["choices"][0]["finish_reason"]
        self._line({"choices": [_choice({}, reason)], "usage": completion["usage"], "trimkv": completion["trimkv"]})

    def _line(self, more: dict[str, Any]) -> None:
        self._write(to_json({**self._head, **more}))


def _choice(delta: dict[str, str], reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
