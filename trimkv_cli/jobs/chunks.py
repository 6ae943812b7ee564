"""The objects in which an answer is streamed, in OpenAI's shapes: the beginning, pieces, the end."""

from __future__ import annotations

from collections.abc import Sequence

from trimkv_cli.events import Answer, TokenEvent
from trimkv_cli.jobs.lines import Item
from trimkv_cli.jobs.records import Record, Recorder, finish_reason, logprobs_of
from trimkv_cli.jobs.requests import Tokenizer
from trimkv_cli.jobs.tool_calls import CallParser, delta


class Chunks:
    """Build the chunks of one item's choices; with `include_usage` one more, at the end, has the usage alone."""

    def __init__(self, recorder: Recorder, item: Item, text: Tokenizer | None, *, include_usage: bool) -> None:
        self._recorder = recorder
        self._item = item
        self._text = text
        self._include_usage = include_usage
        self._head = recorder.head(item, chunk=True)
        template = "" if text is None else text.template.text
        self._parsers = [CallParser.of(item, template, choice=choice) for choice in range(item.choices)]
        self._offsets = [0] * item.choices  # characters of the tokens so far, as a completion's logprobs count them

    def opening(self) -> list[Record]:
        """Return what comes before any token: of a chat, who speaks."""
        if self._item.kind == "completion":
            return []
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self._item.choices)]

    def piece(self, index: int, event: TokenEvent) -> list[Record]:
        """Return what an event brings to a choice, and its end when it ends; nothing for a token without text yet.

        Of calls of tools what may begin one is held back until it is one.
        """
        logprobs = None
        if self._item.params.logprobs is not None and event.token_ids:
            logprobs = logprobs_of(self._item, event, self._text, offset=self._offsets[index])
            if self._item.kind == "completion":
                self._offsets[index] += sum(map(len, logprobs["tokens"]))
        deltas = self._deltas(index, event)
        if not deltas and (logprobs is not None or (self._item.return_token_ids and event.token_ids)):
            deltas = [{"content": ""}]
        chunks = [self._chunk(index, said, logprobs=None if place else logprobs) for place, said in enumerate(deltas)]
        if self._item.return_token_ids and chunks:
            chunks[0]["choices"][0]["token_ids"] = event.token_ids
        if event.finish_reason is not None:
            parser = self._parsers[index]
            reason = finish_reason(event.finish_reason, 0 if parser is None else parser.calls)
            chunks.append(self._chunk(index, {}, reason=reason))
        return chunks

    def _deltas(self, index: int, event: TokenEvent) -> list[Record]:
        parser = self._parsers[index]
        text = "" if self._text is None else event.text
        if parser is None:
            return [{"content": text}] if text else []
        parts = parser.push(text)
        if event.finish_reason is not None:
            parts += parser.finish()
        return [said for part in parts if (said := delta(part)) is not None]

    def closing(self, last: Record, answers: Sequence[Answer]) -> list[Record]:
        """Return the last chunk of a choice with what there is to know, and after it the usage, if asked for.

        Only the usage has no choice beside it: programs look at the first one of each chunk.
        """
        notices = [notice for parser in self._parsers if parser is not None for notice in parser.notices]
        tail = self._recorder.tail(self._item, answers, notices)
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
