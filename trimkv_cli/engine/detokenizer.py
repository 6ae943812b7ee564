"""Text of a stream of token ids: whole characters only, ended by stop strings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # what decoders show for bytes that are not (yet) a character
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_WINDOW, _CONTEXT = 12, 4  # an unfinished character spans at most 3 tokens, so it lies in the last 4


class Detokenizer:
    """Decode one answer piece by piece, at a cost linear in its length.

    The pieces and `finish()` together are the tokenizer's decoding of all ids (special tokens skipped, spaces not
    cleaned up), cut before the stop string that is completed first. Special tokens of `shown` stand for their texts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        *,
        hidden: frozenset[int] | None = None,
        shown: Mapping[int, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden_ids(tokenizer) if hidden is None else hidden
        self._shown_tokens = shown or {}
        self._stop = _StopStrings(stop)
        self._window: list[int] = []  # the latest ids: enough to decode the next one in its context
        self._shown = 0  # characters of the window's text that were handed on

    @property
    def stopped(self) -> bool:
        """Say whether a stop string has come."""
        return self._stop.found

    def push(self, token_id: int) -> str:
        """Take the next id and return the text that is certain now, maybe none."""
        if token_id in self._shown_tokens and not self.stopped:
            return self._stop.push(self._rest() + self._shown_tokens[token_id])
        token = None if token_id in self._hidden else self._tokenizer.convert_ids_to_tokens(token_id)
        if not token or self.stopped:
            return ""
        self._window.append(token_id)
        # Decoders judge a run of byte tokens as one: it is text or garbage as a whole, known only at its end.
        return "" if _BYTE_TOKEN.fullmatch(token) else self._stop.push(self._decode_window())

    def finish(self) -> str:
        """Return what was held back; a character that is still unfinished comes out as U+FFFD."""
        if self.stopped:
            return ""
        return self._stop.push(self._rest()) + self._stop.finish()

    def _rest(self) -> str:
        """Begin anew, and return what was held back of characters."""
        rest = self._decode(self._window)[self._shown :]
        self._window, self._shown = [], 0
        return rest

    def _decode_window(self) -> str:
        text = self._decode(self._window)
        certain = len(text) - text.endswith(_UNFINISHED)
        piece, self._shown = text[self._shown : certain], max(self._shown, certain)
        if len(self._window) > _WINDOW:
            self._forget(text)
        return piece

    def _forget(self, text: str) -> None:
        """Keep only the last few ids, when they decode to the end of `text` without the others."""
        tail = self._decode(self._window[-_CONTEXT:])
        if tail and text.endswith(tail):
            self._window = self._window[-_CONTEXT:]
            self._shown -= len(text) - len(tail)

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class _StopStrings:
    """Pass text on up to the first stop string, holding back what may become one.

    The stop string completed by the earliest character wins (the longest of those that end there), however the text
    was cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        if not piece or self.found:
            return ""
        text = self._held + piece
        matches = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        self.found = bool(matches)
        cut = min(matches)[1] if matches else len(text) - self._unsure(text)
        self._held = "" if matches else text[cut:]
        return text[:cut]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held

    def _unsure(self, text: str) -> int:
        """Measure the longest end of `text` with which a stop string begins."""
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(lengths, default=0)


def hidden_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """List the special tokens, which are not text; `<think>` and its like are added tokens, but not special."""
    added = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_ids) | {token_id for token_id, token in added.items() if token.special}


def token_pieces(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """Return what each token says, special ones by name; a character of several tokens stands with the last of them."""
    hidden = hidden_ids(tokenizer)
    pieces: list[str] = []
    decoder = Detokenizer(tokenizer, hidden=hidden)
    for token_id in token_ids:
        if token_id in hidden:
            if pieces:
                pieces[-1] += decoder.finish()
            pieces.append(str(tokenizer.convert_ids_to_tokens(token_id)))
        else:
            pieces.append(decoder.push(token_id))
    if pieces:
        pieces[-1] += decoder.finish()
    return pieces
