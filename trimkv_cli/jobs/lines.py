"""One input line as a request, or the reason why it is none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import orjson
from pydantic import ValidationError

from trimkv_cli.errors import UsageError
from trimkv_cli.events import Notice
from trimkv_cli.jobs.bodies import HARMLESS, IDLE, INSTEAD, BatchLine, Body, SimpleLine, Strict, explain, is_harmless
from trimkv_cli.jobs.formats import Form, make_form
from trimkv_cli.jobs.reading import Line
from trimkv_cli.jobs.tools import Tools, check_history, make_tools, tool_notes
from trimkv_cli.request import SamplingParams

Kind: TypeAlias = Literal["chat", "completion", "simple", "text"]

_URLS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "chat/completions": ("chat", ("messages",)),
    "completions": ("completion", ("prompt", "prompt_token_ids")),
}
_SIMPLE = ("prompt", "messages", "prompt_token_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One request; exactly one of `messages`, `prompt` and `prompt_token_ids` is given."""

    line: int
    custom_id: str
    kind: Kind
    params: SamplingParams
    messages: tuple[dict[str, Any], ...] | None = None
    tools: Tools | None = None
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    special_tokens: bool = False  # those that `prompt` names are tokens
    think: bool | None = None
    return_token_ids: bool = False
    choices: int = 1
    max_tokens_said: bool = True  # False: the default, which may become what the positions leave
    limit_key: str = "max_tokens"  # as the line calls it
    warnings: tuple[Notice, ...] = ()

    @property
    def source(self) -> str:
        """Name the key that holds the prompt."""
        if self.messages is not None:
            return "messages"
        return "prompt" if self.prompt_token_ids is None else "prompt_token_ids"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLine:
    """A line that gets no answer; `status` None means that not even a request could be read from it."""

    line: int
    custom_id: str | None
    status: Literal[400, 404] | None
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    further: tuple[str, ...] = ()  # what else is wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Say how lines are read: what they leave open, and what they may say."""

    defaults: SamplingParams = field(default_factory=SamplingParams)
    special_tokens: bool = False
    think: bool | None = None
    strict: bool = False
    text: bool = False  # every line is a prompt
    has_ids: bool = True  # lines may have ids of their own
    max_tokens_said: bool = True  # the default of max_tokens is what the user gave
    model_names: frozenset[str] = frozenset()  # names that mean the model that runs; empty = every name does


class Refused(Exception):
    """End the parsing of one line."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: Literal[400, 404] = 400
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


def parse_line(line: Line, rules: Rules) -> Item | BadLine:
    """Parse one line; seeds come from `rules.defaults.seed` and the id where the line has none."""
    if line.problem is not None:
        return _unreadable(line.number, line.problem)
    if rules.text:
        custom_id = line.custom_id or f"line-{line.number}"
        params = replace(rules.defaults, seed=derive_seed(rules.defaults.seed, custom_id))
        return Item(
            line=line.number,
            custom_id=custom_id,
            kind="text",
            params=params,
            prompt=line.text,
            special_tokens=rules.special_tokens,
            think=rules.think,
            max_tokens_said=rules.max_tokens_said,
        )
    try:
        data = from_json(line.text)
    except orjson.JSONDecodeError as error:
        return _unreadable(line.number, f"invalid JSON at column {error.colno}: {error.msg}")
    if not isinstance(data, dict):
        return _unreadable(line.number, f"a line is a JSON object, not {_JSON_NAMES[type(data)]}")
    return _parse_object(line.number, data, rules)


def parse_body(number: int, data: Any, kind: Kind, rules: Rules, *, custom_id: str) -> Item | BadLine:
    """Parse the body of a request to the url of this kind, as `parse_line` does a line's."""
    sources = next(sources for name, sources in _URLS.values() if name == kind)
    if not isinstance(data, dict):
        message = f"the body is a JSON object, not {_JSON_NAMES[type(data)]}"
        return BadLine(line=number, custom_id=custom_id, status=400, message=message)

    def read() -> Item:
        body = Body.model_validate(data)
        return _item(number, custom_id, body, kind=kind, sources=sources, rules=rules)

    return _or_bad(number, custom_id, read)


def id_of(line: Line, rules: Rules) -> str | None:
    """Return the id that `parse_line` would give a line, without reading the rest of it."""
    if line.problem is not None:
        return None
    implied = line.custom_id or f"line-{line.number}"
    if rules.text:
        return implied
    try:
        data = from_json(line.text)
        return _custom_id(data) or implied if isinstance(data, dict) else None
    except orjson.JSONDecodeError:
        return None
    except Refused:
        return implied


def from_json(text: str) -> Any:
    """Read JSON, and NaN, Infinity and 1e400 in it, as Python does: a key that is read refuses them by name."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if "NaN" not in text and "Infinity" not in text and "infinity" not in error.msg:
            raise
        try:
            data = json.loads(text)
            json.dumps(data, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError):
            data = None
        if data is None:
            raise
        return data


def derive_seed(run_seed: int, custom_id: str) -> int:
    """Return the seed of a line that names none: a function of the run's seed and the line's id alone."""
    digest = hashlib.sha256(f"{run_seed}\0{custom_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _parse_object(number: int, data: dict[str, Any], rules: Rules) -> Item | BadLine:
    implied = f"line-{number}"
    try:
        custom_id = _custom_id(data) or implied
    except Refused as refused:
        return _bad_request(number, implied, refused)

    def read() -> Item:
        if "url" in data or "body" in data:
            return _batch_item(number, custom_id, data, rules)
        body = SimpleLine.model_validate(data)
        return _item(number, custom_id, body, kind="simple", sources=_SIMPLE, rules=rules)

    return _or_bad(number, custom_id, read)


def _or_bad(number: int, custom_id: str, read: Callable[[], Item]) -> Item | BadLine:
    try:
        return read()
    except ValidationError as error:
        (param, message), *others = explain(error)
        further = tuple(message for _, message in others)
        return BadLine(line=number, custom_id=custom_id, status=400, message=message, param=param, further=further)
    except Refused as refused:
        return _bad_request(number, custom_id, refused)


def _bad_request(number: int, custom_id: str, refused: Refused) -> BadLine:
    return BadLine(
        line=number,
        custom_id=custom_id,
        status=refused.status,
        message=str(refused),
        param=refused.param,
        code=refused.code,
    )


def _batch_item(number: int, custom_id: str, data: dict[str, Any], rules: Rules) -> Item:
    outer = BatchLine.model_validate(data)
    kind, sources = _endpoint(outer.url)
    body = Body.model_validate(outer.body)
    item = _item(number, custom_id, body, kind=kind, sources=sources, rules=rules)
    return replace(item, warnings=(*_notices(outer, None, rules), *item.warnings))


def _endpoint(url: str) -> tuple[Kind, tuple[str, ...]]:
    """Return what an address asks for: with or without a host, a version, a deployment, a query or a last slash."""
    path = url.partition("?")[0].rstrip("/")
    for name, endpoint in _URLS.items():
        if path == name or path.endswith(f"/{name}"):
            return endpoint
    known = " or ".join(f"/v1/{name}" for name in _URLS)
    raise Refused(f"unknown url {url[:64]!r}: use {known}", param="url", code="unknown_url", status=404)


def _item(number: int, custom_id: str, body: Body, *, kind: Kind, sources: tuple[str, ...], rules: Rules) -> Item:
    source = _source(body, sources)
    form = _form(body)
    notes = () if form is None else tuple(Notice(code="schema", message=note) for note in form.notes)
    tools = _tools(body)
    warnings = (*_notices(body, body.model, rules), *notes, *tool_notes(body))
    params = _params(body, custom_id, kind, rules.defaults, form)
    think = body.chat_template_kwargs.enable_thinking if body.chat_template_kwargs else None
    item = Item(
        line=number,
        custom_id=custom_id,
        kind=kind,
        params=params,
        tools=tools,
        special_tokens=rules.special_tokens if body.special_tokens is None else body.special_tokens,
        think=rules.think if think is None else think,
        return_token_ids=bool(body.return_token_ids),
        choices=body.n or 1,
        max_tokens_said=rules.max_tokens_said or "max_tokens" in body.sampling(),
        limit_key="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        warnings=warnings,
    )
    if source == "messages":
        if body.special_tokens:
            raise Refused("special_tokens: is for a prompt; messages are taken literally", param="special_tokens")
        return replace(item, messages=tuple(message.plain() for message in body.messages or ()))
    prompt = getattr(body, source)
    return replace(item, prompt=prompt) if isinstance(prompt, str) else replace(item, prompt_token_ids=tuple(prompt))


def _custom_id(data: dict[str, Any]) -> str | None:
    for name in ("custom_id", "id"):
        value = data.get(name)
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int) or value == ""):
            raise Refused(f"{name}: should be a string that is not empty", param=name)
        if value is not None:
            return str(value)
    return None


def _source(body: Body, sources: tuple[str, ...]) -> str:
    """Return the one key that holds the prompt."""
    given = [name for name in _SIMPLE if getattr(body, name) is not None]
    if not given:
        raise Refused(f"{sources[0]}: field required", param=sources[0])
    for name in given:
        if name not in sources:
            raise Refused(f"{name}: this url takes {sources[0]}", param=name)
    if len(given) > 1:
        raise Refused(f"{given[1]}: give either this or {given[0]}", param=given[1])
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise Refused("max_tokens: give either this or max_completion_tokens", param="max_tokens")
    return given[0]


def _params(body: Body, custom_id: str, kind: Kind, defaults: SamplingParams, form: Form | None) -> SamplingParams:
    said = {**body.sampling(), "logprobs": _logprobs(body, kind), "grammar": form and form.grammar}
    said.setdefault("seed", derive_seed(defaults.seed, custom_id))
    try:
        return replace(defaults, **said)
    except UsageError as error:
        raise Refused(error.message, param=error.param) from error


def _logprobs(body: Body, kind: Kind) -> int | None:
    """Return how many of the likeliest tokens to report; None = no log probabilities at all."""
    said = body.logprobs
    if kind == "completion":
        if isinstance(said, bool):
            raise Refused("logprobs: this url takes a number", param="logprobs")
        if body.top_logprobs is not None:
            raise Refused("top_logprobs: this url takes logprobs, a number", param="top_logprobs")
        return said
    if said is not None and not isinstance(said, bool):
        raise Refused("logprobs: should be true or false; top_logprobs is a number", param="logprobs")
    if body.top_logprobs and not said:
        raise Refused("top_logprobs: needs logprobs to be true", param="top_logprobs")
    return body.top_logprobs or 0 if said else None


def _form(body: Body) -> Form | None:
    try:
        return make_form(body.response_format)
    except UsageError as error:
        raise Refused(f"response_format.{error.message}", param="response_format", code="invalid_schema") from error


def _tools(body: Body) -> Tools | None:
    try:
        check_history(body.messages or [])
        return make_tools(body)
    except UsageError as error:
        raise Refused(error.message, param=error.param) from error


def _notices(model: Strict, name: str | None, rules: Rules) -> tuple[Notice, ...]:
    """List what is passed over in one object; what would change the answer is refused."""
    unknown = []
    for key, value in model.extras():
        if key in HARMLESS and not is_harmless(key, value):
            what = f"not supported: give {INSTEAD[key]}" if key in INSTEAD else "not supported with this value"
            raise Refused(f"{key}: {what}", param=key, code="unsupported_parameter")
        if key not in HARMLESS and key not in IDLE:
            unknown.append(_passed_over("unknown_key", f"unknown key {key[:64]!r} ignored", key, rules))
    if name is not None and rules.model_names and name not in rules.model_names:
        unknown.append(_passed_over("foreign_model", f"model {name[:64]!r} is not the one that runs", "model", rules))
    return tuple(unknown)


def _passed_over(code: str, message: str, param: str, rules: Rules) -> Notice:
    if not rules.strict:
        return Notice(code=code, message=message)
    if code == "foreign_model":
        raise Refused(message, param=param, code="model_not_found", status=404)
    raise Refused(f"{param}: unknown key", param=param, code="unknown_parameter")


def _unreadable(number: int, message: str) -> BadLine:
    return BadLine(line=number, custom_id=None, status=None, message=message, code="invalid_line")


def duplicate(number: int, custom_id: str) -> BadLine:
    """Refuse a line whose id an earlier line had."""
    message = f"custom_id {custom_id[:64]!r} was used by an earlier line"
    return BadLine(
        line=number, custom_id=custom_id, status=400, message=message, param="custom_id", code="duplicate_custom_id"
    )


_JSON_NAMES = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}
