"""The objects in which an answer is streamed, in OpenAI's shapes: the beginning, pieces, the end."""

from __future__ import annotations

from collections.abc import Sequence

from trimkv_cli.events import Answer, TokenEvent
from trimkv_cli.jobs.lines import Item
from trimkv_cli.jobs.records import Record, Recorder, logprobs_of
from trimkv_cli.jobs.requests import Tokenizer


class Chunks:
    """Build the chunks of one item's choices; with `include_usage` one more, at the end, has the usage alone."""

    def __init__(self, recorder: Recorder, item: Item, text: Tokenizer | None, *, include_usage: bool) -> None:
        self._recorder = recorder
        self._item = item
        self._text = text
        self._include_usage = include_usage
        self._head = recorder.head(item, chunk=True)
        self._offsets = [0] * item.choices  # characters of the tokens so far, as a completion's logprobs count them

    def opening(self) -> list[Record]:
        """Return what comes before any token: of a chat, who speaks."""
        if self._item.kind == "completion":
            return []
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self._item.choices)]

    def piece(self, index: int, event: TokenEvent) -> list[Record]:
        """Return what an event brings to a choice, and its end when it ends; nothing for a token without text yet."""
        logprobs = None
        if self._item.params.logprobs is not None and event.token_ids:
            logprobs = logprobs_of(self._item, event, self._text, offset=self._offsets[index])
            if self._item.kind == "completion":
                self._offsets[index] += sum(map(len, logprobs["tokens"]))
        chunks = []
        text = "" if self._text is None else event.text
        if text or logprobs is not None or (self._item.return_token_ids and event.token_ids):
            chunk = self._chunk(index, {"content": text}, logprobs=logprobs)
            if self._item.return_token_ids:
                chunk["choices"][0]["token_ids"] = event.token_ids
            chunks.append(chunk)
        if event.finish_reason is not None:
            chunks.append(self._chunk(index, {}, reason=event.finish_reason))
        return chunks

    def closing(self, last: Record, answers: Sequence[Answer]) -> list[Record]:
        """Return the last chunk of a choice with what there is to know, and after it the usage, if asked for.

        Only the usage has no choice beside it: programs look at the first one of each chunk.
        """
        tail = self._recorder.tail(self._item, answers)
        ended = {**last, "trimkv": tail["trimkv"]}
        return [ended, {**self._head, "choices": [], "usage": tail["usage"]}] if self._include_usage else [ended]

    def _chunk(self, index: int, delta: Record, *, reason: str | None = None, logprobs: Record | None = None) -> Record:
        choice: Record = {"index": index, "finish_reason": reason, "logprobs": logprobs}
        if self._item.kind == "completion":
            choice["text"] = delta.get("content", "")
        else:
            choice["delta"] = delta
        chunk = {**self._head, "choices": [choice]}
        return {**chunk, "usage": None} if self._include_usage else chunk
