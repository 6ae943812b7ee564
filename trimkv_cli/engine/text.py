"""Token ids of text and messages; what a user typed never becomes a special token, unless they say so."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from trimkv_cli.engine.detokenizer import Detokenizer, hidden_ids
from trimkv_cli.engine.thoughts import ThinkTags, no_thoughts
from trimkv_cli.errors import BrokenModel, ModelNotFound, TrimkvError, UnsupportedModel, UsageError
from trimkv_cli.files import as_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Detokenizer", "Message", "Prompt", "Text"]

# "role" and "content", both strings; also "tool_calls" (arguments as objects) and "tool_call_id", as OpenAI has them
Message = Mapping[str, Any]
Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")
_PROBES = ("a", "1")  # two user texts that share no token
_TEMPLATE_S = 10.0  # a template that needs as long for one word goes on for ever
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "trimkv_probe",
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "A text."}}},
    },
}
_PROBE_CALL = {"id": "trimkv123", "type": "function", "function": {"name": "trimkv_probe", "arguments": {"a": "b"}}}
_PROBE_RESULT = "trimkv_result"
_NINE = re.compile(r"length\s*!=\s*9")  # templates that refuse ids of calls unless they are nine letters and digits
_PRIVATE_USE = range(0xE000, 0xF900)  # characters without a meaning, to mark places in a rendered template


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
        self._template = _template_of(tokenizer)
        self._added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
        special = [self._added[token_id] for token_id in self.hidden_ids if token_id in self._added]
        self.special_tokens = tuple(special)
        named = [token for token in self._added.values() if token.strip() and token in (self._template or "")]
        self._special = _TokenStarts(special)
        self._typed = _TokenStarts([*special, *named])
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
                f"{folder_or_id} has no tokenizer that can be loaded: {_first_line(error)}",
                hint="get the folder again, or save it again with save_pretrained",
            ) from error
        except Exception as error:  # what the tokenizers library raises on a broken file
            hint = "try --trust-remote-code" if "trust_remote_code" in str(error) else "get its files again"
            raise UnsupportedModel(f"the tokenizer of {folder_or_id} fails: {_first_line(error)}", hint=hint) from error
        return cls(tokenizer, name=name or str(folder_or_id))

    @property
    def supports_chat(self) -> bool:
        return self._template is not None

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokenizer's end of a text, and the special token that the template puts after an answer."""
        ends = (getattr(self.tokenizer, "eos_token_id", None), self._turn_end())
        return frozenset(token_id for token_id in ends if token_id is not None)

    def check_chat(self, *, instead: str) -> None:
        """Render one word, to find out what is wrong with the template before weights are read.

        Raises:
            UnsupportedModel: there is none; the hint is `instead`.
            BrokenModel: it has a bug, or does not come to an end.
        """
        if self._template is None:
            raise UnsupportedModel(f"{self.name} has no chat template", hint=instead)
        bugs: list[BrokenModel] = []
        probe = threading.Thread(target=self._probe_template, args=(bugs,), daemon=True)
        probe.start()
        probe.join(_TEMPLATE_S)
        if probe.is_alive():
            bugs.append(self._bug(f"it goes on for more than {_TEMPLATE_S:g} s"))
        if bugs:
            raise BrokenModel(bugs[0].message, hint=f"{bugs[0].hint}; {instead}")

    @property
    def supports_thinking(self) -> bool:
        """Say whether the template knows `enable_thinking`; where it does not, `think` has no effect."""
        return "enable_thinking" in (self._template or "")

    @cached_property
    def think_tags(self) -> ThinkTags | None:
        """How the model writes its reasoning; None where neither its tokenizer nor its template knows how."""
        return ThinkTags.find(
            {token: token_id for token_id, token in self._added.items()},
            self._template or "",
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

    @property
    def template(self) -> str:
        """The chat template's text, "" without one."""
        return self._template or ""

    @cached_property
    def supports_tools(self) -> bool:
        """Say whether the template tells the model of tools."""
        return "trimkv_probe" in self._probe([{"role": "user", "content": "a"}], [_PROBE_TOOL])

    @cached_property
    def supports_calls(self) -> bool:
        """Say whether the template renders calls of earlier answers, and their results."""
        call = {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}
        result = {"role": "tool", "tool_call_id": _PROBE_CALL["id"], "content": _PROBE_RESULT}
        said = self._probe([{"role": "user", "content": "a"}, call, result], [])
        return "trimkv_probe" in said and _PROBE_RESULT in said

    @property
    def template_hash(self) -> str:
        """Return a short hash of the chat template, "" without one."""
        return "" if self._template is None else hashlib.sha256(self._template.encode()).hexdigest()[:16]

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
        first, *rest = self._typed.mark(text, mark).split(mark)
        return [*before, *self._encode(first), *self._encode_inside(rest), *after]

    def named_tokens(self, text: str) -> list[str]:
        """List the special tokens that a plain prompt names, and which `encode` takes for text by default."""
        return self._typed.found(text)

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
        self._check_tools(messages, tools)
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
        guarded = [self._guarded(message, mark) for message in messages]
        guarded[answered] = {"role": "assistant", "content": answer}
        rendered = self._render(guarded, think, tools=self._typed.mark_all(tools, mark))
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

    def render_marked(self, messages: Sequence[Message], mark: str, *, answer_next: bool) -> str:
        """Render a conversation as text, with `mark` inside whatever a user typed that looks like a token.

        With `answer_next` the text ends where the next answer begins; raises as `render_chat` does.
        """
        return self._render([self._guarded(message, mark) for message in messages], None, answer_next=answer_next)

    def encode_parts(self, parts: Sequence[str]) -> list[list[int]]:
        """Encode the parts of a rendered conversation one by one: no token reaches from one into the next."""
        return [self._encode_inside([part]) if index else self._encode(part) for index, part in enumerate(parts)]

    def _turn_end(self) -> int | None:
        if self._template is None:
            return None
        (answer,) = unused_characters([], 1)
        messages = [*_answered(_PROBES[0], answer), {"role": "user", "content": _PROBES[1]}]
        try:
            _, found, tail = self._render(messages, None).rpartition(answer)
        except TrimkvError:  # a template for single questions
            return None
        end = self._leading_token(tail.lstrip()) if found else None
        return end if end in self.hidden_ids else None

    def _render_ids(self, messages: Sequence[Message], think: bool | None, tools: Sequence[Tool] = ()) -> list[int]:
        (mark,) = unused_characters([_as_json([messages, tools])], 1)
        guarded = [self._guarded(message, mark) for message in messages]
        first, *rest = self._render(guarded, think, tools=self._typed.mark_all(tools, mark)).split(mark)
        return self._encode(first) + self._encode_inside(rest)

    def _check_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        if tools and self._template is not None and not self.supports_tools:
            raise UsageError(
                f"tools: the chat template of {self.name} knows no tools",
                hint="leave them out, or take a model whose template has them: Qwen3, Llama 3.1, Mistral, gpt-oss",
                param="tools",
            )
        calls = any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
        if calls and self._template is not None and not self.supports_calls:
            raise UsageError(
                f"messages: the chat template of {self.name} knows no calls of tools",
                hint="leave calls and results out, or say them in words",
                param="messages",
            )

    def _probe(self, messages: list[dict[str, Any]], tools: Sequence[Tool]) -> str:
        try:
            return self._render([self._guarded(message, "") for message in messages], None, tools=tools)
        except TrimkvError:
            return ""

    def _render(
        self,
        messages: list[dict[str, Any]],
        think: bool | None,
        *,
        tools: Sequence[Tool] = (),
        answer_next: bool = True,
    ) -> str:
        if self._template is None:
            raise UnsupportedModel(f"{self.name} has no chat template", hint="trimkv ask --raw needs none")
        if not messages:
            raise UsageError("there are no messages to answer", hint='give at least one: {"role": "user", …}')
        options: dict[str, Any] = {"enable_thinking": think} if think is not None and self.supports_thinking else {}
        options |= {"tools": [*tools]} if tools else {}
        try:
            text: object = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer_next, **options
            )
        except Exception as error:  # code that came with the model may raise anything
            if type(error) is not TemplateError:  # which its raise_exception() raises
                raise self._bug(f"{type(error).__name__}: {_first_line(error)}") from error
            raise UsageError(f"the model's chat template refuses: {error}", hint=_refusal_hint(messages)) from error
        assert isinstance(text, str)
        return text

    def _probe_template(self, bugs: list[BrokenModel]) -> None:
        try:
            if not self._render([{"role": "user", "content": _PROBES[0]}], None).strip():
                bugs.append(self._bug("it renders nothing of a message"))
        except BrokenModel as error:
            bugs.append(error)
        except UsageError:
            return  # that it refuses one word alone is its right

    def _bug(self, what: str) -> BrokenModel:
        return BrokenModel(
            f"the chat template of {self.name} has a bug: {what}",
            hint="mend chat_template.jinja, or chat_template in tokenizer_config.json",
        )

    def _guarded(self, message: Message, mark: str) -> dict[str, Any]:
        """Mark token strings in a message's texts; an answer may contain `<think>`, which templates look for."""
        starts = self._special if message["role"] == "assistant" else self._typed
        guarded = {key: value if key == "role" else starts.mark_all(value, mark) for key, value in message.items()}
        if calls := message.get("tool_calls"):
            guarded["tool_calls"] = [self._guarded_call(call, mark) for call in calls]
        if "tool_call_id" in message:
            guarded["tool_call_id"] = self._call_id(message["tool_call_id"])
        return guarded

    def _guarded_call(self, call: Mapping[str, Any], mark: str) -> dict[str, Any]:
        return {**call, "id": self._call_id(call["id"]), "function": self._typed.mark_all(call["function"], mark)}

    def _call_id(self, call_id: str) -> str:
        """Return an id that the template takes, and in which nothing is a token."""
        if re.fullmatch(r"[A-Za-z0-9]{9}", call_id):
            return call_id
        short = hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:9]
        return short if _NINE.search(self.template) else re.sub(r"[^\w-]", "_", call_id)

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


class _TokenStarts:
    """Find where strings that the tokenizer would read as one token begin in a text."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = frozenset(token for token in tokens if len(token) > 1)
        self._lengths = sorted({len(token) for token in self._tokens})
        first = "".join(sorted({token[0] for token in self._tokens}))
        self._first = re.compile(f"[{re.escape(first)}]" if first else r"(?!)")

    def mark(self, text: str, mark: str) -> str:
        """Put `mark` after the first character of each token string in `text`, so that it is one no longer."""
        return self._first.sub(lambda found: found[0] + (mark if self._at(text, found.start()) else ""), text)

    def mark_all(self, value: Any, mark: str) -> Any:
        """Put `mark` into every text of a JSON value, its keys included."""
        if isinstance(value, str):
            return self.mark(value, mark)
        if isinstance(value, Mapping):
            return {self.mark(key, mark): self.mark_all(each, mark) for key, each in value.items()}
        return [self.mark_all(each, mark) for each in value] if isinstance(value, list | tuple) else value

    def found(self, text: str) -> list[str]:
        """List, each once, the token strings that stand in `text`; of those at one place the longest."""
        starts = (match.start() for match in self._first.finditer(text))
        lengths = ((start, length) for start in starts for length in self._lengths)
        at = {start: text[start : start + length] for start, length in lengths if self._is_token(text, start, length)}
        return list(dict.fromkeys(at.values()))

    def _is_token(self, text: str, start: int, length: int) -> bool:
        return text[start : start + length] in self._tokens

    def _at(self, text: str, start: int) -> bool:
        return any(self._is_token(text, start, length) for length in self._lengths)


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        return tokenizer.get_chat_template() if tokenizer.chat_template else None
    except ValueError:  # several named templates, none of them the default
        return None


def unused_characters(texts: Iterable[str], count: int) -> list[str]:
    """Return characters without a meaning that none of the texts contains, to mark places in them."""
    used = set().union(*texts)
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    return [next(free) for _ in range(count)]


def _answered(question: str, answer: str = "") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=dict)


def _common(left: list[int], right: list[int]) -> list[int]:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    return [token_id for token_id, _ in pairs]


def _refusal_hint(messages: Sequence[Message]) -> str:
    if any(message["role"] == "system" for message in messages):
        return "this model may know no system message: leave it out, or put it into the first user message"
    return "user and assistant messages alternate, beginning with a user's"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
