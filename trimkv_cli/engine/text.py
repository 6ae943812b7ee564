"""Token ids of text and messages; what a user typed never becomes a special token, unless they say so."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from trimkv_cli.engine.chat_template import ChatTemplate, Message, Tool, first_line, unused_characters
from trimkv_cli.engine.detokenizer import Detokenizer, hidden_ids
from trimkv_cli.engine.thoughts import ThinkTags, no_thoughts
from trimkv_cli.errors import ModelNotFound, TrimkvError, UnsupportedModel
from trimkv_cli.files import as_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Detokenizer", "Message", "Prompt", "Text"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_PROBES = ("a", "1")  # two user texts that share no token


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A rendered conversation; its first `prefix_len` ids depend on the system message alone (0 without one)."""

    token_ids: tuple[int, ...]
    prefix_len: int = 0


class Text:
    """Own a model's tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, name: str = "the model") -> None:
        self.tokenizer = tokenizer
        self.name = name
        self.hidden_ids = hidden_ids(tokenizer)
        self._added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
        special = [self._added[token_id] for token_id in self.hidden_ids if token_id in self._added]
        self.special_tokens = tuple(special)
        self.template = ChatTemplate(tokenizer, name=name, special=special, added=self._added.values())
        self._anchor = self._find_anchor()
        self._system: tuple[object, list[int]] = (None, [])

    @classmethod
    def from_pretrained(
        cls,
        folder_or_id: str | Path,
        *,
        revision: str | None = None,
        offline: bool = False,
        trust_remote_code: bool = False,
        name: str | None = None,
    ) -> Text | None:
        """Load the tokenizer of a folder or hub id, of a model called `name`; None for a folder without one.

        Raises:
            ModelNotFound: no such repository or folder.
            UnsupportedModel: the tokenizer's files cannot be read, or need code that is not trusted.
        """
        from transformers import AutoTokenizer

        folder = Path(folder_or_id)
        if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return None
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder_or_id), revision=revision, local_files_only=offline, trust_remote_code=trust_remote_code
            )
        except OSError as error:
            raise ModelNotFound(
                f"{folder_or_id} has no tokenizer that can be loaded: {first_line(error)}",
                hint="get the folder again, or save it again with save_pretrained",
            ) from error
        except Exception as error:  # what the tokenizers library raises on a broken file
            hint = "try --trust-remote-code" if "trust_remote_code" in str(error) else "get its files again"
            raise UnsupportedModel(f"the tokenizer of {folder_or_id} fails: {first_line(error)}", hint=hint) from error
        return cls(tokenizer, name=name or str(folder_or_id))

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokenizer's end of a text, and the special token that the template puts after an answer."""
        ends = (getattr(self.tokenizer, "eos_token_id", None), self._turn_end())
        return frozenset(token_id for token_id in ends if token_id is not None)

    @cached_property
    def think_tags(self) -> ThinkTags | None:
        """How the model writes its reasoning; None where neither its tokenizer nor its template knows how."""
        return ThinkTags.find(
            {token: token_id for token_id, token in self._added.items()},
            self.template.text,
            ends=self.hidden_ids,
            token_text=self.token_text,
            encode=lambda text: self._encode_inside([text]),
        )

    def check_thinking(self) -> None:
        """Raise when the model knows no reasoning.

        Raises:
            UsageError: it does not.
        """
        if self.think_tags is None:
            raise no_thoughts(self.name)

    def detokenizer(self, stop: Sequence[str] = (), *, shown: Collection[int] = ()) -> Detokenizer:
        """Start decoding one answer, in which those special tokens that are `shown` are text."""
        texts = {token_id: self._added[token_id] for token_id in shown if token_id in self.hidden_ids}
        return Detokenizer(self.tokenizer, stop, hidden=self.hidden_ids, shown=texts)

    def added_id(self, token: str) -> int | None:
        """Return the id of a token that was added to the vocabulary, special or not; None for any other text."""
        return next((token_id for token_id, content in self._added.items() if content == token), None)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Encode a plain prompt, with the BOS (and EOS) that the tokenizer adds by default.

        With `special` the tokens that it names are tokens, as in a prompt that a template has rendered elsewhere; a BOS
        that it begins with is not doubled.
        """
        before, after = self._wrapping()
        if special:
            ids = self._encode(text)
            begins, ends = ids[: len(before)] == before, ids[len(ids) - len(after) :] == after
            return [*([] if begins else before), *ids, *([] if ends else after)]
        (mark,) = unused_characters([text], 1)
        first, *rest = self.template.typed.mark(text, mark).split(mark)
        return [*before, *self._encode(first), *self._encode_inside(rest), *after]

    def named_tokens(self, text: str) -> list[str]:
        """List the special tokens that a plain prompt names, and which `encode` takes for text by default."""
        return self.template.typed.found(text)

    def token_text(self, token_id: int) -> str:
        """Return what one token says by itself; U+FFFD stands for bytes that are no whole character."""
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def render_chat(
        self, messages: Sequence[Message], *, tools: Sequence[Tool] = (), think: bool | None = None
    ) -> Prompt:
        """Render a conversation up to where the answer begins, with the tools that the model is told of.

        Raises:
            UsageError: the template refuses the messages (a system role, two users in a row), or knows no tools.
            UnsupportedModel: the model has no chat template.
            BrokenModel: it has a bug.
        """
        self.template.check_tools(messages, tools)
        ids = self._render_ids(messages, think, tools)
        system = [message for message in messages[:1] if message["role"] == "system"]
        if not (system or tools):
            return Prompt(token_ids=tuple(ids))
        shared = _common(self._system_ids(system, think, tools), ids)
        return Prompt(token_ids=tuple(ids), prefix_len=min(len(shared), len(ids) - 1))

    def render_turn(
        self,
        user_text: str,
        *,
        last_token_id: int | None,
        eos_token_ids: Collection[int] = (),
        think: bool | None = None,
    ) -> list[int]:
        """Render what to feed for the next turn of a chat: from the last answer's final token on.

        `last_token_id` was generated and not yet fed. Where it ended the answer (it is one of `eos_token_ids`), the
        template's own end of an answer stands for it; else (cut by length or by the user) that end follows it.
        """
        turns = [*_answered(_PROBES[0]), {"role": "user", "content": user_text}]
        return self.render_rest(turns, 1, last_token_id=last_token_id, eos_token_ids=eos_token_ids, think=think)

    def render_rest(
        self,
        messages: Sequence[Message],
        answered: int,
        *,
        last_token_id: int | None,
        eos_token_ids: Collection[int] = (),
        tools: Sequence[Tool] = (),
        think: bool | None = None,
    ) -> list[int]:
        """Render what to feed after `messages[answered]`, an answer that was generated, as `render_turn` does.

        Raises:
            UnsupportedModel: the template drops earlier answers.
            UsageError: it refuses the messages.
            BrokenModel: it has a bug.
        """
        mark, answer = unused_characters([_as_json([messages, tools])], 2)
        generated = {"role": "assistant", "content": answer}
        conversation = [*messages[:answered], generated, *messages[answered + 1 :]]
        rendered = self.template.render(conversation, think, tools=tools, mark=mark)
        _, found, tail = rendered.rpartition(answer)
        if not found:
            raise UnsupportedModel(
                "the chat template drops earlier answers, so a chat cannot go on turn by turn",
                hint="trimkv ask takes each question as a conversation of its own",
            )
        end = self._leading_token(tail.lstrip())
        ended = last_token_id == end or {last_token_id, end} <= {*eos_token_ids}
        if last_token_id is None or (end is not None and ended):
            return self._encode_inside(tail.lstrip().split(mark))
        return [last_token_id, *self._encode_inside(tail.split(mark))]

    def encode_parts(self, parts: Sequence[str]) -> list[list[int]]:
        """Encode the parts of a rendered conversation one by one: no token reaches from one into the next."""
        return [self._encode_inside([part]) if index else self._encode(part) for index, part in enumerate(parts)]

    def _turn_end(self) -> int | None:
        if not self.template:
            return None
        (answer,) = unused_characters([], 1)
        messages = [*_answered(_PROBES[0], answer), {"role": "user", "content": _PROBES[1]}]
        try:
            _, found, tail = self.template.render(messages).rpartition(answer)
        except TrimkvError:  # a template for single questions
            return None
        end = self._leading_token(tail.lstrip()) if found else None
        return end if end in self.hidden_ids else None

    def _render_ids(self, messages: Sequence[Message], think: bool | None, tools: Sequence[Tool] = ()) -> list[int]:
        (mark,) = unused_characters([_as_json([messages, tools])], 1)
        first, *rest = self.template.render(messages, think, tools=tools, mark=mark).split(mark)
        return self._encode(first) + self._encode_inside(rest)

    def _system_ids(self, system: Sequence[Message], think: bool | None, tools: Sequence[Tool]) -> list[int]:
        """Return the ids that conversations with this system message and tools share; the last ones are remembered."""
        key = ([dict(message) for message in system], think, [dict(tool) for tool in tools])
        known, ids = self._system  # at once: several threads may render
        if known != key:
            probes = ([*system, {"role": "user", "content": text}] for text in _PROBES)
            ids = _common(*(self._render_ids(probe, think, tools) for probe in probes))
            self._system = (key, ids)
        return ids

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        text = as_text(text, "the text")  # tokenizers end with an error of their own
        return list(self.tokenizer.encode(text, add_special_tokens=special, verbose=False)) if text or special else []

    def _encode_inside(self, parts: Iterable[str]) -> list[int]:
        """Encode each part as it is encoded in the middle of a prompt: no space is put before it."""
        skip = 1 if self._anchor else 0
        return [token_id for part in parts if part for token_id in self._encode(self._anchor + part)[skip:]]

    def _find_anchor(self) -> str:
        """Find a special token that can stand before any text and changes nothing in it; "" where there is none."""
        for token_id, token in self.tokenizer.added_tokens_decoder.items():
            plain = token.special and not (token.rstrip or token.lstrip or token.single_word)
            if plain and self._encode(token.content) == [token_id]:
                return str(token.content)
        return ""

    def _wrapping(self) -> tuple[list[int], list[int]]:
        """Split what the tokenizer adds to every text into what comes before and after it."""
        inner, whole = self._encode("a"), self._encode("a", special=True)
        start = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
        return whole[:start], whole[start + len(inner) :]

    def _leading_token(self, text: str) -> int | None:
        leading = {token: token_id for token_id, token in self._added.items() if text.startswith(token)}
        return leading[max(leading, key=len)] if leading else None


def _answered(question: str, answer: str = "") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=dict)


def _common(left: list[int], right: list[int]) -> list[int]:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return [token_id for token_id, _ in pairs]
