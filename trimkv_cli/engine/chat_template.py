"""The chat template of a model: conversations as text, in which what a user typed is marked, and what it can do."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from trimkv_cli.errors import BrokenModel, TrimkvError, UnsupportedModel, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# "role" and "content", both strings; also "tool_calls" (arguments as objects) and "tool_call_id", as OpenAI has them
Message = Mapping[str, Any]
Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}

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


class ChatTemplate:
    """Own the chat template of a tokenizer, of a model called `name`; it may have none."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, name: str, special: Sequence[str], added: Iterable[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._text = _template_of(tokenizer)
        self._special = TokenStarts(special)
        #: What a text that somebody typed would have read as tokens: special ones, and others that the template names.
        self.typed = TokenStarts([*special, *(token for token in added if token.strip() and token in self.text)])

    def __bool__(self) -> bool:
        return self._text is not None

    @property
    def text(self) -> str:
        """What stands in it, "" without one."""
        return self._text or ""

    @property
    def hash(self) -> str:
        """Return a short hash of its text, "" without one."""
        return "" if self._text is None else hashlib.sha256(self._text.encode()).hexdigest()[:16]

    @property
    def supports_thinking(self) -> bool:
        """Say whether it knows `enable_thinking`; where it does not, `think` has no effect."""
        return "enable_thinking" in self.text

    @cached_property
    def supports_tools(self) -> bool:
        """Say whether it tells the model of tools."""
        return "trimkv_probe" in self._probe([{"role": "user", "content": "a"}], [_PROBE_TOOL])

    @cached_property
    def supports_calls(self) -> bool:
        """Say whether it renders calls of earlier answers, and their results."""
        call = {"role": "assistant", "content": "", "tool_calls": [_PROBE_CALL]}
        result = {"role": "tool", "tool_call_id": _PROBE_CALL["id"], "content": _PROBE_RESULT}
        said = self._probe([{"role": "user", "content": "a"}, call, result], [])
        return "trimkv_probe" in said and _PROBE_RESULT in said

    def check(self, *, instead: str) -> None:
        """Render one word, to find out what is wrong before weights are read.

        Raises:
            UnsupportedModel: there is none; the hint is `instead`.
            BrokenModel: it has a bug, or does not come to an end.
        """
        if not self:
            raise UnsupportedModel(f"{self._name} has no chat template", hint=instead)
        bugs: list[BrokenModel] = []
        probe = threading.Thread(target=self._render_one_word, args=(bugs,), daemon=True)
        probe.start()
        probe.join(_TEMPLATE_S)
        if probe.is_alive():
            bugs.append(self._bug(f"it goes on for more than {_TEMPLATE_S:g} s"))
        if bugs:
            raise BrokenModel(bugs[0].message, hint=f"{bugs[0].hint}; {instead}")

    def check_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> None:
        """Raise when it cannot tell the model of tools, or of what they were called with.

        Raises:
            UsageError: it says nothing of them.
        """
        if tools and self and not self.supports_tools:
            raise UsageError(
                f"tools: the chat template of {self._name} knows no tools",
                hint="leave them out, or take a model whose template has them: Qwen3, Llama 3.1, Mistral, gpt-oss",
                param="tools",
            )
        calls = any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
        if calls and self and not self.supports_calls:
            raise UsageError(
                f"messages: the chat template of {self._name} knows no calls of tools",
                hint="leave calls and results out, or say them in words",
                param="messages",
            )

    def render(
        self,
        messages: Sequence[Message],
        think: bool | None = None,
        *,
        tools: Sequence[Tool] = (),
        mark: str = "",
        answer_next: bool = True,
    ) -> str:
        """Render a conversation as text, with `mark` inside whatever somebody typed that looks like a token.

        With `answer_next` the text ends where the next answer begins.

        Raises:
            UsageError: the template refuses the messages (a system role, two users in a row).
            UnsupportedModel: there is none.
            BrokenModel: it has a bug.
        """
        if not self:
            raise UnsupportedModel(f"{self._name} has no chat template", hint="trimkv ask --raw needs none")
        if not messages:
            raise UsageError("there are no messages to answer", hint='give at least one: {"role": "user", …}')
        options: dict[str, Any] = {"enable_thinking": think} if think is not None and self.supports_thinking else {}
        options |= {"tools": self.typed.mark_all(tools, mark)} if tools else {}
        guarded = [self._guarded(message, mark) for message in messages]
        try:
            text: object = self._tokenizer.apply_chat_template(
                guarded, tokenize=False, add_generation_prompt=answer_next, **options
            )
        except Exception as error:  # code that came with the model may raise anything
            if type(error) is not TemplateError:  # which its raise_exception() raises
                raise self._bug(f"{type(error).__name__}: {first_line(error)}") from error
            raise UsageError(f"the model's chat template refuses: {error}", hint=_refusal_hint(messages)) from error
        assert isinstance(text, str)
        return text

    def _probe(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        try:
            return self.render(messages, tools=tools)
        except TrimkvError:
            return ""

    def _render_one_word(self, bugs: list[BrokenModel]) -> None:
        try:
            if not self.render([{"role": "user", "content": "a"}]).strip():
                bugs.append(self._bug("it renders nothing of a message"))
        except BrokenModel as error:
            bugs.append(error)
        except UsageError:
            return  # that it refuses one word alone is its right

    def _bug(self, what: str) -> BrokenModel:
        return BrokenModel(
            f"the chat template of {self._name} has a bug: {what}",
            hint="mend chat_template.jinja, or chat_template in tokenizer_config.json",
        )

    def _guarded(self, message: Message, mark: str) -> dict[str, Any]:
        """Mark token strings in a message's texts; an answer may contain `<think>`, which templates look for."""
        starts = self._special if message["role"] == "assistant" else self.typed
        guarded = {key: value if key == "role" else starts.mark_all(value, mark) for key, value in message.items()}
        if calls := message.get("tool_calls"):
            guarded["tool_calls"] = [self._guarded_call(call, mark) for call in calls]
        if "tool_call_id" in message:
            guarded["tool_call_id"] = self._call_id(message["tool_call_id"])
        return guarded

    def _guarded_call(self, call: Mapping[str, Any], mark: str) -> dict[str, Any]:
        return {**call, "id": self._call_id(call["id"]), "function": self.typed.mark_all(call["function"], mark)}

    def _call_id(self, call_id: str) -> str:
        """Return an id that the template takes, and in which nothing is a token."""
        if re.fullmatch(r"[A-Za-z0-9]{9}", call_id):
            return call_id
        short = hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:9]
        return short if _NINE.search(self.text) else re.sub(r"[^\w-]", "_", call_id)


class TokenStarts:
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


def _refusal_hint(messages: Sequence[Message]) -> str:
    if any(message["role"] == "system" for message in messages):
        return "this model may know no system message: leave it out, or put it into the first user message"
    return "user and assistant messages alternate, beginning with a user's"


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
