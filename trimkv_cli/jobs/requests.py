"""An item as what the engine runs: token ids, one request per choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from trimkv_cli.errors import ContextOverflow, TrimkvError, UsageError
from trimkv_cli.events import Notice
from trimkv_cli.jobs.lines import BadLine, Item, derive_seed
from trimkv_cli.jobs.tool_formats import CallFormat
from trimkv_cli.request import Request, SamplingParams, check_token_ids

_LONG_TEXT = 1 << 18  # characters
_PIECE = 1 << 16
_BORDER_TOKENS = 16  # that a cut, and what begins and ends a text, may add to a piece


class RenderedPrompt(Protocol):
    """Token ids, and where their system message ends."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def prefix_len(self) -> int: ...


class Template(Protocol):
    """What tells the form in which a model calls tools."""

    @property
    def text(self) -> str: ...


class Tokenizer(Protocol):
    """The part of the engine's tokenizer that a job needs."""

    @property
    def template(self) -> Template: ...
    def added_id(self, token: str) -> int | None: ...
    def encode(self, text: str, *, special: bool = False) -> Sequence[int]: ...
    def named_tokens(self, text: str) -> Sequence[str]: ...
    def token_text(self, token_id: int) -> str: ...
    def render_chat(
        self, messages: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]] = (), think: bool | None = None
    ) -> RenderedPrompt: ...


def make_requests(item: Item, text: Tokenizer | None) -> list[Request] | BadLine:
    """Return a request for each choice of an item, or say why there is none."""
    if item.prompt_token_ids is not None:
        return _choices(item, item.prompt_token_ids)
    if text is None:
        return _bad(item, "the model has no tokenizer: give prompt_token_ids", code="no_tokenizer")
    try:
        if item.messages is None:
            token_ids, prefix_len = text.encode(item.prompt or "", special=item.special_tokens), 0
        else:
            rendered = text.render_chat(item.messages, tools=definitions(item), think=item.think)
            token_ids, prefix_len = rendered.token_ids, rendered.prefix_len
        params, shown = call_params(item, text)
    except TrimkvError as error:
        return refused(item, error)
    if not token_ids:
        return _bad(item, "the prompt holds no tokens")
    return _choices(replace(item, params=params), token_ids, prefix_len=prefix_len, shown=shown)


def check_length(item: Item, text: Tokenizer, most: int) -> None:
    """Raise when pieces of a long text have more than `most` tokens: at once it would take its hundredfold.

    Raises:
        ContextOverflow: they have.
    """
    said = item.prompt or "".join(str(message.get("content") or "") for message in item.messages or ())
    if len(said) < _LONG_TEXT:
        return
    tokens = 0
    for start in range(0, len(said), _PIECE):
        tokens += len(text.encode(said[start : start + _PIECE])) - _BORDER_TOKENS
        if tokens > most:
            raise ContextOverflow(f"the prompt has more than {tokens} tokens, and there are {most} positions at most")


def with_warnings(item: Item, text: Tokenizer | None) -> Item:
    """Warn of a prompt that names special tokens and has them read as text, and of calls that are not read."""
    if (
        text is not None
        and item.tools is not None
        and item.tools.callable
        and CallFormat.of(text.template.text) is None
    ):
        message = "calls in the form of this model's template are not read: they stay text"
        item = replace(item, warnings=(*item.warnings, Notice(code="tool_calls_as_text", message=message)))
    if text is None or item.prompt is None or item.special_tokens or not (named := text.named_tokens(item.prompt)):
        return item
    message = (
        f'{", ".join(named[:4])} in a prompt read as text: --special-tokens, or "special_tokens": true in its line'
    )
    return replace(item, warnings=(*item.warnings, Notice(code="special_tokens_as_text", message=message)))


def check_sizes(item: Item, *, vocab_size: int, positions: int | None) -> Item | BadLine:
    """Refuse what no model of this size can answer, as far as that shows without its tokenizer; None = no end."""
    least, asked = len(item.prompt_token_ids or (0,)), item.params.max_tokens
    try:
        item.params.check_vocabulary(vocab_size)
        check_token_ids(item.prompt_token_ids or (), vocab_size)
        needed = least + (asked if item.max_tokens_said else 1) - 1
        if positions is not None and needed > positions:
            param = "max_tokens" if least <= positions else None
            raise ContextOverflow(f"{needed} positions or more are needed, and the model has {positions}", param=param)
    except TrimkvError as error:
        return refused(item, error)
    return item


def fitted(requests: list[Request], item: Item, left: int) -> tuple[list[Request], Item]:
    """Let answers whose length nobody gave be as long as `left` positions allow; the item then carries a warning."""
    shorter = requests if item.max_tokens_said else [request.fitted(left) for request in requests]
    if shorter == requests:
        return requests, item
    notice = Notice(code="max_tokens_reduced", message="fewer positions are left than max_tokens is by default")
    return shorter, replace(item, warnings=(*item.warnings, notice))


def refused(item: Item, error: TrimkvError) -> BadLine:
    """Say that the engine cannot take an item."""
    code = "context_length_exceeded" if isinstance(error, ContextOverflow) else None
    param = item.limit_key if error.param == "max_tokens" else error.param
    if param == "response_format" and item.tools is not None and item.tools.forced:
        param = "tool_choice"
    if param == "tools":
        return _bad(item, f"{error.message}: {error.hint}", code="unsupported_parameter", param=param)
    return _bad(item, error.message, code=code, param=param)


def definitions(item: Item) -> tuple[dict[str, Any], ...]:
    """Return the tools that the template is given."""
    return () if item.tools is None else item.tools.definitions


def call_params(item: Item, text: Tokenizer) -> tuple[SamplingParams, tuple[int, ...]]:
    """Return an item's parameters, with the grammar of calls where they are forced, and the tokens that mark calls.

    Raises:
        UsageError: calls are to be forced, and cannot be.
    """
    tools = item.tools
    if tools is None or not tools.callable:
        return item.params, ()
    form = CallFormat.of(text.template.text)
    if form is None:
        if not tools.forced:
            return item.params, ()
        message = "tool_choice: calls in the form of this model's template cannot be forced"
        raise UsageError(message, hint="tool_choice auto", param="tool_choice")
    grammar = form.grammar(tools, text.added_id) if tools.forced else item.params.grammar
    markers = (text.added_id(marker) for marker in form.markers)
    shown = tuple(token_id for token_id in markers if token_id is not None)
    return replace(item.params, grammar=grammar), shown


def _choices(
    item: Item, token_ids: Sequence[int], *, prefix_len: int = 0, shown: tuple[int, ...] = ()
) -> list[Request]:
    """The first choice has the line's seed; each further one has a seed made from it."""
    name, seed = f"line-{item.line}", item.params.seed
    first = Request(
        id=name,
        prompt_token_ids=tuple(token_ids),
        params=item.params,
        prefix_len=prefix_len,
        shown=shown,
        same_prompt=name if item.choices > 1 else None,
    )
    seeds = (derive_seed(seed, f"choice-{choice}") for choice in range(1, item.choices))
    others = (
        replace(first, id=f"{name}/{choice}", params=replace(item.params, seed=seed))
        for choice, seed in enumerate(seeds, 1)
    )
    return [first, *others]


def _bad(item: Item, message: str, *, code: str | None = None, param: str | None = None) -> BadLine:
    param = param or item.source
    return BadLine(line=item.line, custom_id=item.custom_id, status=400, message=message, param=param, code=code)
